"""Mixtures to export: compositions and others, on tiny models whose files are in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from moelora import MoeLoraConfig
from moelora.layers.base import MoeLoraLayer
from tests.adapters import shake
from tests.conftest import tiny_model

E, R = 3, 4
RANKS = [4, 2, 3]
NAMES = ["maths", "code", "prose"]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def base_folder(folder: Path, name: str = "llama") -> Path:
    """A tiny model as `from_pretrained` reads it."""
    tiny_model(name).save_pretrained(folder)
    return folder


def composition(base: Path, name: str = "llama", *, changes: dict[str, Any] | None = None, **words: Any) -> Any:
    """A composition of three LoRAs of ranks 4, 2 and 3; "code" is not at down_proj.

    Args:
        base: Folder of the base model.
        name: The tiny model in it.
        changes: Fields of its experts to replace.
        **words: Fields of the configuration to replace.
    """
    experts = {"kind": "lora_composed", "num_experts": E, "r": R, "lora_alpha": R, "names": NAMES, "ranks": RANKS}
    config = MoeLoraConfig(
        **{
            "experts": {**experts, **(changes or {})},
            "scores": "task",
            "selection": "dense",
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            **words,
        }
    )
    model = get_peft_model(tiny_model(name), config).eval()
    config.base_model_name_or_path = str(base)  # as `from_pretrained` would have it
    shake(model)
    for layer in model.modules():
        if isinstance(layer, MoeLoraLayer) and layer.routers:
            _pad(layer)
    return model


@torch.no_grad()
def _pad(layer: MoeLoraLayer) -> None:
    """What a composition has where a LoRA has a smaller rank, or is not there."""
    for role in layer.linear_sizes():
        factors = layer.lora_factors(role, "default")
        if factors is None or factors.a_ERD.shape[:2] != (E, R):
            continue
        for expert, rank in enumerate(RANKS):
            factors.a_ERD[expert, rank:] = 0
            factors.b_EOR[expert, :, rank:] = 0
        if layer.name.endswith("down_proj") or role == "down":
            factors.a_ERD[1] = 0
            factors.b_EOR[1] = 0


def fill_centroids(model: Any, centroids: torch.Tensor, *, threshold: float | None = None) -> None:
    """Set the centroids [E, D], a centre of 0.01, and a threshold for each expert."""
    for name, tensor in model.named_parameters():
        with torch.no_grad():
            if name.endswith(".centroids"):
                tensor.copy_(centroids)
            elif name.endswith(".center"):
                tensor.fill_(0.01)
            elif name.endswith(".threshold") and threshold is not None:
                tensor.fill_(threshold)


def saved(model: Any, folder: Path) -> Path:
    """An adapter's folder."""
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def with_lora(base: Path, lora: Path) -> Any:
    """The base model with an exported LoRA, by PEFT alone."""
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).eval()
