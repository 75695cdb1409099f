"""From LoRAs that exist to a mixture on a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import moelora.compose.routers  # noqa: F401 - registers the recipes
from moelora.choices import read, write
from moelora.compose.pool import Untouched, check_fit, check_names, named_sources, shared_modules, write_shared
from moelora.compose.routers.base import Composition, Example, RouterRecipe
from moelora.compose.sources import LoraSource, mean_factors, read_lora
from moelora.compose.tokens import check_rows
from moelora.config import MoeLoraConfig
from moelora.errors import ComposeError
from moelora.files import public_name
from moelora.inject.base_modules import base_modules
from moelora.layers.base import MoeLoraLayer


def from_loras(
    base: Any,
    loras: Mapping[str, str | Path] | Sequence[str | Path],
    router: str | Mapping[str, Any] | RouterRecipe = "uniform",
    *,
    examples: Mapping[str, Sequence[Example]] | None = None,
    trainable: bool = False,
    modules_to_save: Sequence[str] = (),
    adapter_name: str = "default",
    check_base_name: bool = True,
    tokenizer: Any = None,
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
        modules_to_save: Modules of the base that the composition trains whole, from what the base has; what the LoRAs
            saved of them is left out. Any other that LoRAs saved is taken from them, if they agree, and trained on too.
        adapter_name: The adapter's name.
        check_base_name: Whether a LoRA that names another base model is refused. Sizes are checked always.
        tokenizer: The base's tokenizer. With one that has a chat template, recipes that look at whole prompts
            (`centroids`, `glider`) take the last turn of a conversation for its prompt.

    Returns:
        The model with the mixture, in eval mode.

    Raises:
        ComposeError: If a LoRA cannot be an expert, they do not go together or do not fit the base, or the router lacks
            its rows, or a row is no tokenised one. The base is then as it was.
    """
    recipe: RouterRecipe = read("composition", router)
    if tokenizer is not None:
        recipe = recipe.for_tokenizer(tokenizer)
    pool, examples = named_sources(loras), {} if examples is None else examples
    if not isinstance(examples, Mapping):
        raise ComposeError(
            f"examples is a {type(examples).__name__}; allowed: tokenised rows by the name of their expert."
        )
    vocab_size = base.get_input_embeddings().weight.shape[0]
    for name, rows in examples.items():
        check_rows(rows, repr(name), vocab_size)
    recipe.check_examples(list(pool), examples)
    named = recipe.chosen(base, pool, examples, check_base_name)
    sources = [read_lora(name, source) for name, source in named.items()]
    general = [read_lora(source, source) for source in recipe.subtracted()]
    check_names(base, [*sources, *general], check_base_name)
    means = mean_factors(general, sources)
    saved = shared_modules(sources, modules_to_save)
    whole = sorted({*modules_to_save, *(name.rpartition(".")[0] for name in saved)})
    config = _config(base, sources, recipe, trainable, whole, examples)
    untouched = Untouched(base)
    model = get_peft_model(base, config, adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    try:
        for index, source in enumerate(sources):
            _fill(model, adapter_name, index, source, means)
        write_shared(model, adapter_name, saved)
        model.eval()
        recipe.fit(Composition(model, adapter_name, [source.name for source in sources], examples))
    except BaseException:
        untouched.restore(model)
        raise
    return model


def _config(
    base: Any,
    sources: Sequence[LoraSource],
    recipe: RouterRecipe,
    trainable: bool,
    whole: Sequence[str],
    examples: Mapping[str, Sequence[Example]],
) -> MoeLoraConfig:
    """The configuration of the mixture.

    Raises:
        ComposeError: If a LoRA does not fit the base model.
    """
    modules = dict(base_modules(base))
    for source in sources:
        check_fit(modules, source, type(base).__name__)
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
            "sources": [_origin(source, recipe.subtracted()) for source in sources],
            "recipe": _origin_of_router(recipe, examples),
        },
        target_modules=endings if same == sites else sites,
        task_type=sources[0].config.task_type,
        modules_to_save=list(whole) or None,
        **recipe.axes(E, base),
    )
    config.preset = None
    return config


def _origin(source: LoraSource, subtracted: Sequence[str]) -> dict[str, Any]:
    found = {
        "source": public_name(source.source),
        "license": source.license,
        "revision": source.config.revision,
        "minus": [public_name(each) for each in subtracted] or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _origin_of_router(recipe: RouterRecipe, examples: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """The recipe's words but the LoRAs that it subtracts, which are with the experts; and how many rows it had."""
    words = {key: value for key, value in write(recipe).items() if key != "general"}
    rows = {name: len(part) for name, part in examples.items() if part and recipe.reads_examples}
    return {**words, "rows": rows} if rows else words


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
