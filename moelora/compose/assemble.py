"""From LoRAs that exist to a mixture on a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import moelora.compose.routers  # noqa: F401 - registers the recipes
from moelora.choices import read
from moelora.compose.routers.base import Composition, Example, RouterRecipe
from moelora.compose.sources import LoraSource, mean_factors, read_lora
from moelora.config import MoeLoraConfig
from moelora.errors import ComposeError
from moelora.inject.base_modules import base_modules
from moelora.layers.base import MoeLoraLayer
from moelora.layers.modules import is_linear, linear_size


def from_loras(
    base: Any,
    loras: Mapping[str, str | Path] | Sequence[str | Path],
    router: str | Mapping[str, Any] | RouterRecipe = "uniform",
    *,
    examples: Mapping[str, Sequence[Example]] | None = None,
    trainable: bool = False,
    adapter_name: str = "default",
    check_base_name: bool = True,
) -> PeftModel:
    """Make a mixture of LoRAs that exist; each is an expert, and the rest is the router's choice.

    The LoRAs are ordinary PEFT adapters. Their ranks, alphas and target modules may differ: where a LoRA has no weights
    its expert adds nothing. They are read one after the other. The result is an adapter as any other: it can be saved,
    loaded, trained further.

    Args:
        base: The base model. It is wrapped in place, as by `get_peft_model`.
        loras: Folders or names on the Hub, by the name of the expert; of a list the last parts of the paths are the
            names.
        router: The kind of a recipe (see `moelora.compose.routers`), or a dict of its kind and words, such as
            `{"kind": "arrow", "top_k": 2}`.
        examples: Tokenised rows by the name of the expert, for recipes that are fitted on data.
        trainable: Whether the experts are trained further; else only the router is, if it has anything to train.
        adapter_name: The adapter's name.
        check_base_name: Whether a LoRA that names another base model is refused. Sizes are checked always.

    Returns:
        The model with the mixture, in eval mode.

    Raises:
        ComposeError: If a LoRA cannot be an expert, they do not go together or do not fit the base, or the router lacks
            its rows. The base is then as it was.
    """
    recipe: RouterRecipe = read("composition", router)
    named = _named(loras)
    examples = examples or {}
    recipe.check_examples(list(named), examples)
    sources = [read_lora(name, source) for name, source in named.items()]
    general = [read_lora(source, source) for source in recipe.subtracted()]
    _check_names(base, [*sources, *general], check_base_name)
    means = mean_factors(general, sources)
    config = _config(base, sources, recipe, trainable)
    asked, training = [p for p in base.parameters() if p.requires_grad], base.training
    model = get_peft_model(base, config, adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    try:
        for index, source in enumerate(sources):
            _fill(model, adapter_name, index, source, means)
        model.eval()
        recipe.fit(Composition(model, adapter_name, [source.name for source in sources], examples))
    except BaseException:
        model.unload()
        base.train(training)
        for parameter in asked:
            parameter.requires_grad_(True)
        raise
    return model


def _named(loras: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str]:
    """Sources by the name of the expert.

    Raises:
        ComposeError: If there are none, or two have the same name.
    """
    if isinstance(loras, Mapping):
        named = {name: str(source) for name, source in loras.items()}
    else:
        names = [Path(str(source).rstrip("/")).name for source in loras]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ComposeError(
                f"several LoRAs are called {', '.join(twice)} by the ends of their paths; allowed: names that differ. "
                "Give each a name: NAME=PATH, or a dict of paths by name."
            )
        named = dict(zip(names, map(str, loras), strict=True))
    if not named:
        raise ComposeError("there are no LoRAs to compose; allowed: at least one.")
    return named


def _check_names(base: Any, sources: Sequence[LoraSource], check: bool) -> None:
    """Refuse LoRAs of different bases, task types, or of another base than this, by what they state."""
    types = {source.config.task_type for source in sources}
    if len(types) > 1:
        found = ", ".join(f"{source.name}: {source.config.task_type}" for source in sources)
        raise ComposeError(f"the LoRAs are for different task types ({found}); allowed: one.")
    if not check:
        return
    own = getattr(getattr(base, "config", None), "_name_or_path", None)
    stated = {source.name: source.config.base_model_name_or_path for source in sources}
    # the same model may be in a folder here and on the Hub there: the last part of its name is compared
    last = {name: Path(str(of).rstrip("/")).name.lower() for name, of in {**stated, "the base": own}.items() if of}
    if len(set(last.values())) > 1:
        found = ", ".join(f"{name}: {stated.get(name, own)!r}" for name in last)
        raise ComposeError(
            f"the LoRAs and the base model name different bases ({found}); allowed: one. If they are the same model "
            "under different names, pass check_base_name=False (`--any-base-name`)."
        )


def _config(base: Any, sources: Sequence[LoraSource], recipe: RouterRecipe, trainable: bool) -> MoeLoraConfig:
    """The configuration of the mixture.

    Raises:
        ComposeError: If a LoRA does not fit the base model.
    """
    modules = dict(base_modules(base))
    for source in sources:
        _check_fit(modules, source, type(base).__name__)
    sites = {module for source in sources for module in source.shapes}
    endings = {site.rpartition(".")[2] for site in sites}
    same = {name for name in modules if name.rpartition(".")[2] in endings}
    E, r = len(sources), max(source.rank for source in sources)
    config = MoeLoraConfig(
        experts={
            "kind": "lora_composed",
            "num_experts": E,
            "r": r,
            "lora_alpha": r,
            "num_frozen": 0 if trainable else E,
            "names": [source.name for source in sources],
            "ranks": [source.rank for source in sources],
            "sources": [_origin(source) for source in sources],
        },
        target_modules=endings if same == sites else sites,
        task_type=sources[0].config.task_type,
        **recipe.axes(E, base),
    )
    config.preset = None
    return config


def _origin(source: LoraSource) -> dict[str, Any]:
    found = {"source": source.source, "license": source.license, "revision": source.config.revision}
    return {key: value for key, value in found.items() if value is not None}


def _check_fit(modules: Mapping[str, nn.Module], source: LoraSource, base: str) -> None:
    for name, (_, in_features, out_features) in source.shapes.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            found = "no such module" if module is None else f"a {type(module).__name__} there"
            raise ComposeError(
                f"the LoRA {source.source!r} adapts {name!r}, and {base} has {found}; allowed: a LoRA of this base "
                f"model (it names {source.config.base_model_name_or_path!r})."
            )
        if linear_size(module) != (in_features, out_features):
            raise ComposeError(
                f"the LoRA {source.source!r} is made for {in_features} inputs and {out_features} outputs at {name!r}, "
                f"and {base} has {linear_size(module)} there; allowed: a LoRA of this base model (it names "
                f"{source.config.base_model_name_or_path!r})."
            )


@torch.no_grad()
def _fill(
    model: PeftModel, adapter: str, index: int, source: LoraSource, means: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Write a LoRA into its expert, less the mean factors of the general ones; its scaling goes into B."""
    pairs = source.factors()
    for layer in model.modules():
        if not isinstance(layer, MoeLoraLayer):
            continue
        a_ERD, b_EOR = (layer.parts[adapter][factor].get_parameter("weight").data for factor in ("A", "B"))
        a_ERD[index].zero_()
        if layer.name in pairs:
            a_RD, b_OR = (factor.float() for factor in pairs[layer.name])
            if layer.name in means:
                a_RD, b_OR = a_RD - means[layer.name][0], b_OR - means[layer.name][1]
            a_ERD[index, : len(a_RD)].copy_(a_RD)
            b_EOR[index, :, : len(a_RD)].copy_(b_OR * source.scaling(layer.name))
