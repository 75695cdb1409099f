"""Ordinary PEFT LoRAs, as they are on disk or on the Hub, and what keeps one from being an expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor

from moelora.errors import ComposeError
from moelora.formats import check_finite
from moelora.validation import is_real

# Fields of `LoraConfig` under which a LoRA is something else than W + s B A: the harmless value, and the reason.
_PLAIN: dict[str, tuple[Any, str]] = {
    "use_dora": (False, "DoRA also rescales the base weight"),
    "lora_bias": (False, "it adds a bias of its own"),
    "trainable_token_indices": (None, "it replaces embeddings, which all experts would share"),
    "bias": ("none", "it changes biases of the base, which all experts would share"),
    "layer_replication": (None, "it changes the base's layers"),
    "target_parameters": (None, "it adapts parameters, not linears"),
    "alora_invocation_tokens": (None, "it is active behind certain tokens only"),
    "use_qalora": (False, "it pools its input"),
    "use_bdlora": (None, "its factors are block-diagonal"),
    "kasa_config": (None, "it rescales its inner dimension"),
    "arrow_config": (None, "it is a router, not a LoRA"),
    "monteclora_config": (None, "its factors are sampled"),
}
# Initialisations that take a part of the base weight away; the saved factors fit what is left of it only.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class LoraSource:
    """A LoRA that can be an expert.

    Attributes:
        name: What the expert is called.
        source: The folder, or the name on the Hub.
        config: Its configuration.
        shapes: (rank, in_features, out_features) by the name of the linear.
        license: The license that its card states, if it has one.
        saved: What it holds of modules that it trained whole (`modules_to_save`), by the names of the base's tensors.
    """

    name: str
    source: str
    config: LoraConfig
    shapes: dict[str, tuple[int, int, int]]
    license: str | None
    saved: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its linears."""
        return max(rank for rank, _, _ in self.shapes.values())

    def scaling(self, module: str) -> float:
        """The factor of `B A` at a linear."""
        alpha = self.config.alpha_pattern.get(get_pattern_key(self.config.alpha_pattern.keys(), module))
        alpha = self.config.lora_alpha if alpha is None else alpha
        rank = self.shapes[module][0]
        return float(alpha / (math.sqrt(rank) if self.config.use_rslora else rank))

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Read the weights: (A [R, D], B [O, R]) by the name of the linear."""
        return _pairs(self.name, _split(self.config, _weights(self.source))[0])


def read_lora(name: str, source: str | Path) -> LoraSource:
    """Read what a LoRA is.

    Args:
        name: What the expert is called.
        source: A folder, or a name on the Hub.

    Raises:
        ComposeError: If there is none, its files are not readable, or it is not a plain LoRA on linears.
    """
    source = str(source)
    config = _config(source)
    for word, (plain, reason) in _PLAIN.items():
        value = getattr(config, word, plain)
        if value != plain and value:
            raise ComposeError(
                f"the LoRA {source!r} has {word}={value!r}, and {reason}; allowed: {word}={plain!r}. Train it without.",
                anchor="not-a-plain-lora",
            )
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise ComposeError(
            f"the LoRA {source!r} has init_lora_weights={init!r}, which takes a part of the base weight away, so that "
            "its factors do not fit the base that the other experts have; allowed: a LoRA that was converted when it "
            "was saved (`save_pretrained(path_initial_model_for_weight_conversion=...)`).",
            anchor="not-a-plain-lora",
        )
    for value in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if not is_real(value):
            raise ComposeError(
                f"the LoRA {source!r} has lora_alpha={value!r}; allowed: a finite number. Write the one that it was "
                "trained with into its adapter_config.json."
            )
    weights, saved = _split(config, _weights(source))
    pairs = _pairs(source, weights)
    check_finite(saved, f"the LoRA {source!r}", ComposeError)
    shapes = {module: (a.shape[0], a.shape[1], b.shape[0]) for module, (a, b) in pairs.items()}
    return LoraSource(name, source, config, shapes, stated_license(source), saved)


def mean_factors(general: Sequence[LoraSource], experts: Sequence[LoraSource]) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean A [R, D] and the mean B [O, R] of some LoRAs, in fp32 and without scalings, by the name of the linear.

    Args:
        general: The LoRAs; without any the result is empty.
        experts: Those that the means are to be taken from.

    Raises:
        ComposeError: If one of them has other ranks or sites than the others.
    """
    if not general:
        return {}
    for source in (*general, *experts):
        if source.shapes != general[0].shapes:
            differ = sorted(
                name
                for name in source.shapes.keys() | general[0].shapes.keys()
                if source.shapes.get(name) != general[0].shapes.get(name)
            )
            found = [each.shapes.get(differ[0], "nothing") for each in (source, general[0])]
            raise ComposeError(
                f"general LoRAs are subtracted from the factors of each expert, and {source.source!r} has (rank, in, "
                f"out) {found[0]} at {differ[0]!r} where {general[0].source!r} has {found[1]}; allowed: LoRAs of the "
                "same rank on the same linears."
            )
    means: dict[str, tuple[Tensor, Tensor]] = {}
    for source in general:
        for name, (a_RD, b_OR) in source.factors().items():
            a, b = a_RD.float() / len(general), b_OR.float() / len(general)
            means[name] = (means[name][0] + a, means[name][1] + b) if name in means else (a, b)
    return means


def _config(source: str) -> LoraConfig:
    try:
        if Path(source).is_dir() and not (Path(source) / "adapter_config.json").is_file():
            raise ValueError("the folder has no adapter_config.json.")  # PEFT would look for it on the Hub
        config = PeftConfig.from_pretrained(source)
    except (ValueError, OSError, TypeError) as error:
        raise ComposeError(
            f"{source!r} cannot be read as an adapter: {' '.join(str(error).split())} Allowed: a folder with "
            "adapter_config.json and adapter_model.safetensors, or a name on the Hub (owner/name)."
        ) from error
    if not isinstance(config, LoraConfig) or type(config).__name__ != "LoraConfig":
        raise ComposeError(
            f"{source!r} is an adapter of PEFT type {getattr(config.peft_type, 'value', config.peft_type)}; allowed: "
            "LORA. Export a mixture to LoRAs first (`moelora export --to lora`)."
        )
    return config


def _weights(source: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_peft_weights(source, device="cpu")
    except Exception as error:  # safetensors, pickle, the Hub and PEFT each raise their own
        raise ComposeError(
            f"the weights of the LoRA {source!r} cannot be read: {' '.join(str(error).split())} Save or "
            "download it again."
        ) from error
    return weights


def _split(config: LoraConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the LoRA itself, and those of `modules_to_save` by the names of the base's tensors."""
    modules = tuple(f".{name}." for name in config.modules_to_save or ())
    whole = {key for key in weights if ".lora_" not in key and any(module in f".{key}" for module in modules)}
    return (
        {key: tensor for key, tensor in weights.items() if key not in whole},
        {key.removeprefix(_PREFIX): weights[key] for key in whole},
    )


def _pairs(source: str, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the linear.

    Raises:
        ComposeError: If there is anything else, half a pair, a pair whose ranks differ, or a value that is no number.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        module, marker, factor = key.removeprefix(_PREFIX).rpartition(".lora_")
        if not marker or factor not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ComposeError(
                f"the LoRA {source!r} holds {key} {list(tensor.shape)}; allowed: lora_A.weight and lora_B.weight of "
                "linears. LoRAs of embeddings, convolutions and experts' parameters cannot be experts."
            )
        check_finite({key: tensor}, f"the LoRA {source!r}", ComposeError)
        halves.setdefault(module, {})[factor[0]] = tensor
    for module, found in halves.items():
        if len(found) < 2 or found["A"].shape[0] != found["B"].shape[1]:
            shapes = {name: list(tensor.shape) for name, tensor in found.items()}
            raise ComposeError(
                f"the LoRA {source!r} has {shapes} at {module!r}; allowed: A [r, in] and B [out, r]. The file is not "
                "as it was saved."
            )
    if not halves:
        raise ComposeError(f"the LoRA {source!r} holds no weights; allowed: at least one adapted linear.")
    return {module: (found["A"], found["B"]) for module, found in halves.items()}


def stated_license(source: str) -> str | None:
    """The license that a LoRA's card states; None without one, or without a card."""
    card = Path(source) / "README.md"
    try:
        loaded = (
            ModelCard.load(card if card.is_file() else source) if card.is_file() or not Path(source).exists() else None
        )
    except Exception:  # a card is no part of the adapter: a missing or broken one says nothing
        return None
    stated = {} if loaded is None else loaded.data.to_dict()
    found = stated.get("license")
    if found == "other":  # the Hub's word for one that has a name of its own
        found = stated.get("license_name", found)
    return found if isinstance(found, str) else None
