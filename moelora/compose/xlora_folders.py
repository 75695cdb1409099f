"""PEFT's folders of X-LoRA: a configuration, the classifier, and a LoRA of each expert in a folder of its own.

    adapter_config.json   peft_type XLORA; `adapters` has the experts by name, in their order
    adapter_model.safetensors   base_model.internal_xlora_classifier.layers.<i>.{weight,bias}
    <name>/adapter_config.json, <name>/adapter_model.safetensors   for each expert

PEFT itself loads the experts from the paths in `adapters`, and only if they are named "0", "1", ... What it saves in
the experts' folders (0.21.2) is the classifier and parts of the base model: such a folder is not read.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, XLoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora.compose.assemble import from_loras
from moelora.compose.pool import Untouched
from moelora.compose.routers.base import Composition
from moelora.compose.routers.xlora import XLora
from moelora.config import MoeLoraConfig
from moelora.errors import ComposeError
from moelora.experts.composed import ComposedLoraExperts
from moelora.files import written_folder
from moelora.formats import check_finite
from moelora.routing.router import Router
from moelora.scores.classifier import ClassifierScores
from moelora.selection.top_k import TopK

_PREFIX = "base_model.internal_xlora_classifier.layers."
_WEIGHTS = "adapter_model.safetensors"


def read_xlora(
    folder: str | Path, base: Any, *, adapter_name: str = "default", check_base_name: bool = True
) -> PeftModel:
    """Make a mixture of a folder that PEFT's X-LoRA saved, or `write_xlora`.

    Each expert is read from its folder inside if that holds a LoRA, else from the path that the configuration states.

    Args:
        folder: The folder.
        base: The base model; it is wrapped in place.
        adapter_name: The adapter's name.
        check_base_name: See `from_loras`.

    Returns:
        The model with the mixture, in eval mode. Its experts are frozen unless the folder has `use_trainable_adapters`.

    Raises:
        ComposeError: If the folder is none, states what cannot be had here (a first pass with the experts, two
            softmaxes), lacks a part of the classifier, or an expert does not fit. The base is then as it was.
    """
    folder = Path(folder)
    config = _config(folder)
    recipe = _recipe(folder, config)
    loras = {name: str(folder / name) if _is_lora(folder / name) else path for name, path in config.adapters.items()}
    tensors = _classifier(folder, recipe)
    untouched = Untouched(base)
    model = from_loras(
        base,
        loras,
        recipe,
        trainable=config.use_trainable_adapters,
        adapter_name=adapter_name,
        check_base_name=check_base_name,
    )
    router = _router(model, adapter_name)
    for name, tensor in tensors.items():
        own = router.get_parameter(name).data
        is_last = int(name.partition("_")[2]) == recipe.depth - 1
        expected = _by_site(own).shape if is_last else own.shape
        if tensor.shape != expected:
            untouched.restore(model)
            raise ComposeError(
                f"the classifier in {str(folder)!r} has {name} {list(tensor.shape)}; allowed: {list(expected)} for "
                f"{len(loras)} experts and this base model. The folder is for another one."
            )
        own.copy_(tensor.unflatten(0, (-1, len(loras))).transpose(0, 1) if is_last else tensor)
    return model


def write_xlora(model: PeftModel, folder: str | Path, *, adapter_name: str = "default") -> None:
    """Write a mixture as a folder of PEFT's X-LoRA, which `PeftModel.from_pretrained` loads.

    The experts are called "0", "1", ... there, since PEFT finds them only so. PEFT wants `use_cache=False` in the base
    model's configuration. The paths of the experts are absolute: where the folder has moved, pass PEFT `adapters=`.

    Args:
        model: A model with a mixture by the recipe "xlora".
        folder: The folder; it must not exist.
        adapter_name: The adapter's name.

    Raises:
        ComposeError: If it is another mixture, PEFT has no words for it, or the folder exists or cannot be written.
    """
    folder = Path(folder).absolute()
    config = model.peft_config[adapter_name]
    words = _words(config)
    if folder.exists():
        raise ComposeError(f"{str(folder)!r} exists; allowed: a folder that does not. Remove it or name another.")
    names = config.experts.names
    composition = Composition(model, adapter_name, names)
    base = model.get_base_model()
    config = XLoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        hidden_size=config.scores.features,
        adapters={str(index): str(folder / str(index)) for index in range(len(names))},
        use_trainable_adapters=config.experts.num_frozen == 0,
        inference_mode=True,
        **words,
    )
    router = _router(model, adapter_name)
    step = _step(config.xlora_dropout_p)
    tensors = {}
    for piece in router.pieces:
        kind, _, index = piece.partition("_")
        tensor = router.tensor(piece).detach().cpu()
        if int(index) == config.xlora_depth - 1:
            tensor = _by_site(tensor)
        tensors[f"{_PREFIX}{step * int(index)}.{kind}"] = tensor.contiguous()
    with written_folder(folder, ComposeError) as ready:
        config.save_pretrained(str(ready))
        save_file(tensors, ready / _WEIGHTS, metadata={"format": "pt"})
        for expert in range(len(names)):
            _write_expert(composition, expert, ready / str(expert), getattr(base, "name_or_path", None))


def _config(folder: Path) -> XLoraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on odd words; they are refused below
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, OSError, TypeError) as error:
            raise ComposeError(
                f"{str(folder)!r} cannot be read as an adapter: {' '.join(str(error).split())} Allowed: a folder that "
                "PEFT's X-LoRA saved."
            ) from error
    if not isinstance(config, XLoraConfig) or not config.adapters:
        found = getattr(config.peft_type, "value", config.peft_type)
        raise ComposeError(
            f"{str(folder)!r} is an adapter of PEFT type {found} with {len(getattr(config, 'adapters', None) or ())} "
            "adapters; allowed: XLORA with at least one. LoRAs are composed by `from_loras`."
        )
    return config


def _recipe(folder: Path, config: XLoraConfig) -> XLora:
    """The recipe that computes what PEFT does."""
    if config.scaling_pass_value != 0:
        raise ComposeError(
            f"{str(folder)!r} has scaling_pass_value={config.scaling_pass_value!r}, a first pass with the experts in "
            "it; allowed: 0, the base model alone."
        )
    if config.enable_softmax and config.enable_softmax_topk:
        raise ComposeError(
            f"{str(folder)!r} has enable_softmax and enable_softmax_topk, a softmax of a softmax; allowed: one of "
            "them. PEFT warns of it too."
        )
    over_chosen = config.enable_softmax_topk
    return XLora(
        depth=config.xlora_depth,
        size=config.xlora_size,
        dropout=config.xlora_dropout_p,
        softmax=config.enable_softmax or over_chosen,
        # PEFT's softmax over the chosen has no temperature
        temperature=1.0 if over_chosen else config.softmax_temperature,
        layerwise=config.layerwise_scalings,
        top_k=config.top_k_lora,
        renormalize=over_chosen and config.top_k_lora is not None,
        scale=config.global_scaling_weight,
    )


def _words(config: Any) -> dict[str, Any]:
    """The recipe in PEFT's words."""
    known = (
        isinstance(config, MoeLoraConfig)
        and isinstance(config.experts, ComposedLoraExperts)
        and isinstance(config.scores, ClassifierScores)
    )
    if not known:
        found = {axis: getattr(getattr(config, axis, None), "kind", None) for axis in ("experts", "scores")}
        raise ComposeError(
            f"the adapter has {found}; allowed: a mixture of LoRAs with the router 'xlora'. Only that can be written "
            "as an X-LoRA."
        )
    scores, selection = config.scores, config.selection
    top_k = selection if isinstance(selection, TopK) else None
    plain = selection.kind == "dense" and not selection.renormalize
    if top_k is not None:
        plain = top_k.expert_dropout == 0 and not top_k.has_capacity and top_k.multiply_by_gate
        plain = plain and not (top_k.renormalize and (not scores.softmax or scores.temperature != 1))
    if not plain:
        raise ComposeError(
            f"X-LoRA in PEFT has no words for the selection {selection.describe()} with {scores.describe()}; allowed: "
            "all experts, or a top k without dropout and capacity, renormalised with temperature 1 only."
        )
    over_chosen = top_k is not None and top_k.renormalize
    return {
        "xlora_depth": scores.depth,
        "xlora_size": scores.size,
        "xlora_dropout_p": scores.dropout,
        "enable_softmax": scores.softmax and not over_chosen,
        "enable_softmax_topk": over_chosen,
        "softmax_temperature": scores.temperature,
        "layerwise_scalings": scores.layerwise,
        "top_k_lora": None if top_k is None else top_k.k,
    }


def _by_site(tensor: Tensor) -> Tensor:
    """A tensor of the last linear, [E, L, ...] by expert and site, as PEFT has it: [L * E, ...]."""
    return tensor.transpose(0, 1).flatten(0, 1)


def _step(dropout: float) -> int:
    """How far apart the linears are in PEFT's `nn.Sequential`: a ReLU is between, and a dropout if there is one."""
    return 3 if dropout > 0 else 2


def _classifier(folder: Path, recipe: XLora) -> dict[str, Tensor]:
    """The classifier's tensors by the names that `ClassifierScores` has for them."""
    try:
        found = load_file(folder / _WEIGHTS)
    except Exception as error:  # safetensors and the file system each raise their own
        raise ComposeError(
            f"the classifier {str(folder / _WEIGHTS)!r} cannot be read: {' '.join(str(error).split())} Save it again."
        ) from error
    check_finite(found, repr(str(folder / _WEIGHTS)), ComposeError)
    step = _step(recipe.dropout)
    names = {f"{_PREFIX}{step * i}.{kind}": f"{kind}_{i}" for i in range(recipe.depth) for kind in ("weight", "bias")}
    if set(found) != set(names):
        missing, unknown = sorted(set(names) - set(found)), sorted(set(found) - set(names))
        raise ComposeError(
            f"the classifier in {str(folder)!r} lacks {missing} and has besides {unknown}; allowed: a weight and a "
            f"bias of each of its {recipe.depth} linears. Some versions of PEFT (0.21.2 among them) leave out of the "
            "file each linear whose number is an adapter's name: write that file from the model in memory instead."
        )
    return {name: found[key] for key, name in names.items()}


def _is_lora(folder: Path) -> bool:
    """Whether a folder holds the weights of a LoRA and nothing else."""
    try:
        with safe_open(folder / _WEIGHTS, "pt") as file:
            names: list[str] = list(file.keys())
    except (OSError, SafetensorError):
        return False
    return all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def _router(model: PeftModel, adapter: str) -> Router:
    return next(iter(Composition(model, adapter, ()).layers())).routers[adapter]


def _write_expert(composition: Composition, index: int, folder: Path, base: str | None) -> None:
    """An expert as an ordinary LoRA with scaling 1; where it is 0 it has nothing."""
    rank = composition.config.experts.ranks[index]
    tensors: dict[str, Tensor] = {}
    sites = []
    for layer in composition.layers():
        a_ERD, b_EOR = composition.factors(layer)
        a_RD, b_OR = a_ERD[index, :rank], b_EOR[index, :, :rank]
        if not (bool(a_RD.any()) or bool(b_OR.any())):
            continue
        sites.append(layer.name)
        for factor, tensor in (("A", a_RD), ("B", b_OR)):
            tensors[f"base_model.model.{layer.name}.lora_{factor}.weight"] = tensor.cpu().contiguous().clone()
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sites,
        task_type=composition.config.task_type,
        base_model_name_or_path=base or None,
        inference_mode=True,
    )
    lora.save_pretrained(str(folder))
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
