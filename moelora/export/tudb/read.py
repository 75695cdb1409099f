"""Read a folder of MixLoRA's authors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.export.adapter import one_line, open_adapter, read_json
from moelora.export.output import CONFIG_FILE, WEIGHTS_FILE, check_free, output_folder, save_tensors
from moelora.export.tudb.names import ATTENTION, LEAST_DROPOUT, PICKLE_FILE, ROLES, activation_of
from moelora.hub.read import local_folder
from moelora.validation import check_keys, is_count, is_real, is_share

_KEY = re.compile(
    r"mixlora\.layers\.(\d+)\.(?:mlp\.(?:moe_gate|(\w+)\.experts\.\d+\.lora_[AB])|self_attn\.(\w+)\.lora_[AB])\.weight"
)
_NEEDED = ("r", "lora_alpha", "lora_dropout", "target_modules", "num_experts", "routing_strategy")
_KNOWN = (
    *_NEEDED,
    *("peft_type", "task_type", "bias", "base_model_name_or_path", "act_fn", "top_k", "expert_lora", "lora_init"),
    *("use_dora", "use_rslora", "router_aux_loss_coef", "router_init_range", "router_loss", "jitter_noise"),
)


def read_mixlora(folder: str | Path, output: str | Path, *, base: str | None = None) -> Path:
    """Write a folder of MixLoRA's authors as an adapter of moelora, for `PeftModel.from_pretrained`.

    The pickle is read with `weights_only=True`.

    Args:
        folder: A folder with adapter_config.json and adapter_model.bin, or the name of such a Hub repository.
        output: The folder to write; it must not exist.
        base: Name or folder of the base model, whose configuration is read; None takes the one that the folder names.

    Returns:
        `output`.

    Raises:
        ExportError: If a file is missing or damaged, moelora cannot express what it says, or the output cannot be
            written. Nothing is left at `output` then.
        HubError: If there is no such folder or repository.
        MoeLoraError: If it does not fit the base model.
    """
    check_free(output)
    folder = local_folder(folder, CONFIG_FILE, PICKLE_FILE)
    words, tensors, linears = read_folder(folder)
    config = _our_config(words, linears, base)
    with output_folder(output) as ready:
        config.save_pretrained(str(ready))
        save_tensors(tensors, ready / WEIGHTS_FILE)
        activation = activation_of(open_adapter(ready).base)
        if words.get("act_fn") not in (None, activation):
            raise ExportError(
                f"act_fn is {words['act_fn']!r}, but the base model's is {activation!r}; allowed: the base model's. Is "
                f"{config.base_model_name_or_path!r} the right base?"
            )
    return Path(output)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """Its configuration, its tensors under moelora's names, and the names of the adapted linears.

    Raises:
        ExportError: If a file is missing or damaged, or moelora cannot express what it says.
    """
    words = read_json(folder / CONFIG_FILE)
    _check_words(words)
    weights = _read_pickle(folder / PICKLE_FILE)
    tensors, linears = _our_weights(weights, words["num_experts"], words["r"])
    targets = words["target_modules"]
    listed = {name for name, wanted in targets.items() if wanted} if isinstance(targets, dict) else set(targets)
    if linears - listed:
        raise ExportError(
            f"{str(folder)!r} has weights of {', '.join(sorted(linears - listed))}, which its target_modules "
            f"({', '.join(sorted(listed))}) do not list; allowed: weights of targets. The two files do not belong "
            "together."
        )
    return words, tensors, linears


def _check_words(words: Mapping[str, Any]) -> None:
    """Refuse a configuration that is not MixLoRA's, or says what moelora cannot express."""
    kind, strategy = words.get("peft_type"), words.get("routing_strategy")
    if kind != "MIXLORA":
        raise ExportError(f"peft_type is {kind!r}; allowed: 'MIXLORA', in a folder of MixLoRA's authors.")
    if strategy != "mixlora":
        raise ExportError(
            f"routing_strategy is {strategy!r}; allowed: 'mixlora', top-k routing. 'mixlora-dynamic' (top-p) and "
            "'mixlora-switch' (a capacity, dropped tokens) cannot be read."
        )
    missing = [name for name in _NEEDED if name not in words]
    if missing:
        raise ExportError(f"{CONFIG_FILE} lacks {', '.join(missing)}; allowed: all of {', '.join(_NEEDED)}.")
    check_keys(CONFIG_FILE, words, _KNOWN)
    experts = {name: value for name, value in words.get("expert_lora", {}).items() if name in _OF_EXPERTS}
    differ = {name: value for name, value in experts.items() if value != words.get(name, _OF_EXPERTS[name])}
    top_k, E = words.get("top_k", 2), words["num_experts"]
    for name, value, good, allowed in (
        ("r", words["r"], is_count(words["r"]), "an integer of at least 1"),
        ("num_experts", E, is_count(E), "an integer of at least 1"),
        ("top_k", top_k, is_count(top_k) and is_count(E) and top_k <= E, f"1 to num_experts ({E})"),
        ("lora_alpha", words["lora_alpha"], is_real(words["lora_alpha"]), "a number"),
        ("lora_dropout", words["lora_dropout"], is_share(words["lora_dropout"]), "0 <= lora_dropout < 1"),
        ("target_modules", words["target_modules"], isinstance(words["target_modules"], (list, dict)), "names"),
        ("bias", words.get("bias", "none"), words.get("bias", "none") == "none", "'none'"),
        ("task_type", words.get("task_type"), words.get("task_type") in ("CAUSAL_LM", "QUESTION_ANS"), "'CAUSAL_LM'"),
        ("use_dora", words.get("use_dora"), not words.get("use_dora"), "False: magnitudes are not in the file"),
        ("jitter_noise", words.get("jitter_noise"), not words.get("jitter_noise"), "0: moelora has no jitter"),
        ("expert_lora", differ, not differ, "what the plain LoRAs have"),
    ):
        if not good:
            raise ExportError(f"{name} of {CONFIG_FILE} is {value!r}; allowed: {allowed}.")


_OF_EXPERTS = {"r": None, "lora_alpha": None, "lora_dropout": None, "use_dora": False, "use_rslora": False}
"""Words of "expert_lora" that shape an expert, with the value of one that is not there."""


def _read_pickle(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ExportError(f"there is no {str(file)!r}; allowed: a folder with {CONFIG_FILE} and {PICKLE_FILE}.")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ExportError(
            f"{str(file)!r} cannot be read as tensors alone (weights_only=True): {one_line(error)[:200]} It is cut "
            "off, or holds code; ask for it anew, and do not load it by other means."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(each, Tensor) for each in weights.values()):
        raise ExportError(f"{str(file)!r} holds a {type(weights).__name__}; allowed: a dict of tensors by name.")
    return weights


def _our_weights(weights: Mapping[str, Tensor], E: int, R: int) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors under moelora's names, and the names of the linears.

    Raises:
        ExportError: If a tensor is missing, or has no place.
    """
    matches = [match for match in map(_KEY.fullmatch, weights) if match is not None]
    layers = sorted({int(match[1]) for match in matches})
    linears = sorted({match[2] for match in matches if match[2] in ROLES})
    attention = sorted({match[3] for match in matches if match[3] in ATTENTION})
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()

    def take(key: str) -> Tensor:
        if key not in weights:
            raise ExportError(f"{PICKLE_FILE} lacks {key}; allowed: the same targets and {E} experts in every layer.")
        used.add(key)
        tensor, rank = weights[key], {"lora_A": 0, "lora_B": 1}.get(key.split(".")[-2])
        if tensor.dim() != 2 or (rank is not None and tensor.shape[rank] != R):
            raise ExportError(f"{key} is {list(tensor.shape)}; allowed: two dimensions, a factor's rank {R} (r).")
        return tensor

    for layer in layers:
        theirs, ours = f"mixlora.layers.{layer}", f"base_model.model.model.layers.{layer}"
        tensors[f"{ours}.mlp.moelora_router.weight"] = take(f"{theirs}.mlp.moe_gate.weight")
        for factor in ("A", "B"):
            for name in linears:
                experts = [take(f"{theirs}.mlp.{name}.experts.{expert}.lora_{factor}.weight") for expert in range(E)]
                tensors[f"{ours}.mlp.moelora_{factor}.{ROLES[name]}"] = torch.stack(experts)
            for name in attention:
                plain = take(f"{theirs}.self_attn.{name}.lora_{factor}.weight")
                tensors[f"{ours}.self_attn.{name}.moelora_{factor}.weight"] = plain.unsqueeze(0)
    if weights.keys() - used:
        raise ExportError(
            f"{PICKLE_FILE} holds {sorted(weights.keys() - used)[0]}, which has no place; allowed: moe_gate, and "
            f"lora_A and lora_B of {', '.join((*ATTENTION, *ROLES))} in each of {len(layers)} layers, {E} experts."
        )
    if not linears:
        raise ExportError(f"{PICKLE_FILE} holds no experts of a feed-forward block; allowed: at least one linear's.")
    return tensors, {*linears, *attention}


def _our_config(words: Mapping[str, Any], linears: set[str], base: str | None) -> MoeLoraConfig:
    dropout = float(words["lora_dropout"])
    return MoeLoraConfig.from_preset(
        "mixlora",
        r=words["r"],
        lora_alpha=words["lora_alpha"],
        lora_dropout=0.0 if dropout <= LEAST_DROPOUT else dropout,
        use_rslora=bool(words.get("use_rslora", False)),
        num_experts=words["num_experts"],
        top_k=words.get("top_k", 2),
        renormalize=True,
        balance_loss="mixtral",
        balance_coef=words.get("router_aux_loss_coef", 1e-3) if words.get("router_loss", True) else 0.0,
        router_init_std=words.get("router_init_range", 0.02),
        target_modules=sorted(linears),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base or words.get("base_model_name_or_path"),
        inference_mode=True,
    )
