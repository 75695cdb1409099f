"""Write an adapter as a folder of MixLoRA's authors."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.export.adapter import OpenAdapter, open_adapter
from moelora.export.output import CONFIG_FILE, output_folder
from moelora.export.record import export_record, write_record
from moelora.export.tudb.names import ATTENTION, LEAST_DROPOUT, PICKLE_FILE, ROLES, activation_of

_SITE = re.compile(r"model\.layers\.(\d+)\.(?:mlp|self_attn\.(\w+))")


def write_mixlora(
    adapter: str | Path | PeftModel, output: str | Path, *, base: str | None = None, adapter_name: str = "default"
) -> Path:
    """Write an adapter as a folder of MixLoRA's authors.

    A dropout of 0, which their code refuses, is written as 1e-9. A pooled balance loss (kind "mixtral") and the
    router's initial deviation are written in the words that their code reads.

    Args:
        adapter: A model with the adapter, the folder of a saved one, or its name on the Hub.
        output: The folder to write; it must not exist.
        base: See `open_adapter`. It is recorded in the folder, which has to name a base model.
        adapter_name: Of a model, the name of the adapter.

    Returns:
        `output`.

    Raises:
        ExportError: If the format cannot express the adapter, or it cannot be read or written. Nothing is left at
            `output` then.
        MoeLoraError: If the adapter does not fit the base model.
    """
    opened = open_adapter(adapter, base=base, adapter_name=adapter_name)
    check_choices(opened.config)
    _check_opened(opened)
    weights = _their_weights(opened)
    words = _their_words(opened)
    # into memory first: torch reports a full disk in ways of its own
    pickled = io.BytesIO()
    torch.save(weights, pickled)
    with output_folder(output) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(words, indent=2) + "\n")
        (folder / PICKLE_FILE).write_bytes(pickled.getbuffer())
        write_record(folder, export_record("mixlora", opened.config, opened.base_name))
    return Path(output)


def check_choices(config: MoeLoraConfig) -> None:
    """Refuse choices that the format has no words for.

    Raises:
        ExportError: Names the choice.
    """
    scores, selection, experts = config.scores.describe(), config.selection, config.experts
    softmax = config.scores.kind == "linear" and config.scores.activation == "softmax" and not config.scores.bias
    top_k = selection.kind == "top_k" and selection.renormalize
    limits = top_k and (selection.expert_dropout, selection.capacity_factor)
    alpha = experts.lora_alpha
    for name, value, good, allowed in (
        ("placement", config.placement.kind, config.placement.kind == "feed_forward", "'feed_forward'"),
        ("scores", scores, softmax, "a linear with a softmax and no bias"),
        ("selection", selection.describe(), top_k, "top_k with renormalize=True"),
        ("expert_dropout, capacity_factor", limits, not top_k or limits == (0, None), "neither"),
        ("lora_alpha", alpha, alpha > 0 and alpha == int(alpha), "a positive integer"),
        ("task_type", config.task_type, config.task_type == "CAUSAL_LM", "'CAUSAL_LM'"),
    ):
        if not good:
            raise _refusal(name, value, allowed)


def _check_opened(adapter: OpenAdapter) -> None:
    mixed = [site.name for site in adapter.routed if not site.is_block]
    if mixed:
        raise _refusal("a mixture on a linear", ", ".join(mixed[:4]), "mixtures of feed-forward blocks alone")
    if not adapter.base_name:
        raise _refusal("the base model's name", adapter.base_name, "a name or a folder; give it as base")


def _refusal(name: str, value: object, allowed: str) -> ExportError:
    return ExportError(f"MixLoRA's folders cannot hold {name} {value!r}; allowed: {allowed}.")


def _their_words(adapter: OpenAdapter) -> dict[str, Any]:
    config = adapter.config
    targets = {linear.rpartition(".")[2] for site in adapter.sites for linear in site.linears.values()}
    pooled = [choice.coef for choice in config.balance if choice.kind == "mixtral"]
    return {
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "r": config.experts.r,
        "lora_alpha": int(config.experts.lora_alpha),
        "lora_dropout": max(float(config.experts.lora_dropout), LEAST_DROPOUT),
        "use_rslora": config.experts.use_rslora,
        "target_modules": sorted(targets),
        "routing_strategy": "mixlora",
        "num_experts": config.experts.num_experts,
        "top_k": config.selection.k,
        "act_fn": activation_of(adapter.base),
        **({"router_aux_loss_coef": float(pooled[0])} if pooled else {}),
        **({} if config.scores.init_std is None else {"router_init_range": float(config.scores.init_std)}),
    }


def _their_weights(adapter: OpenAdapter) -> dict[str, Tensor]:
    """The tensors under their names.

    Raises:
        ExportError: If not every layer has the same targets, which their code takes for granted.
    """
    weights: dict[str, Tensor] = {}
    layers: dict[str, set[str]] = {}
    for site in adapter.sites:
        place = _SITE.fullmatch(site.name)
        linears = {role: linear.rpartition(".")[2] for role, linear in site.linears.items()}
        if place is None or not set(linears.values()) <= {*ROLES, *ATTENTION}:
            raise ExportError(
                f"MixLoRA's folders have no place for {site.name!r}; allowed: {', '.join((*ATTENTION, *ROLES))} in "
                "model.layers. Leave it out when training (exclude_modules)."
            )
        path = f"mixlora.layers.{place[1]}." + ("mlp" if place[2] is None else f"self_attn.{place[2]}")
        layers.setdefault(place[1], set()).update(("mlp",) if place[2] is None else (), linears.values())
        if site.router is not None:
            weights[f"{path}.moe_gate.weight"] = site.router.tensor("weight").detach().cpu().clone()
        for role, factors in site.factors.items():
            changed = factors.scaling / adapter.config.experts.scaling
            for factor, stack in (("A", factors.expanded_a_ERD()), ("B", factors.b_EOR * changed)):
                for expert, matrix in enumerate(stack):
                    of_expert = f".{linears[role]}.experts.{expert}" if site.is_block else ""
                    weights[f"{path}{of_expert}.lora_{factor}.weight"] = matrix.clone()
    every = {str(index) for index in range(adapter.base.config.num_hidden_layers)}  # type: ignore[union-attr, arg-type]
    first = layers[min(layers)]
    if layers.keys() != every or "mlp" not in first or any(each != first for each in layers.values()):
        raise ExportError(
            f"the layers {', '.join(sorted(layers, key=int))} of {len(every)} are adapted, or not all at the same "
            "linears; allowed: mixtures in all layers, at the same linears. MixLoRA's code routes every layer."
        )
    return weights
