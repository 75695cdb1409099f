"""Tiny LoRAs on disk, as PEFT saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.conftest import tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_lora(folder: Path, seed: int, model: str = "llama", **words: Any) -> Path:
    """Save a LoRA with random weights of a size that changes the outputs."""
    words = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **words}
    peft_model = get_peft_model(tiny_model(model), LoraConfig(**words))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in peft_model.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    peft_model.save_pretrained(str(folder))
    return folder


def three_loras(folder: Path, **words: Any) -> dict[str, str]:
    """Three LoRAs alike but for their weights."""
    names = ("sums", "words", "facts")
    return {name: str(save_lora(folder / name, seed, **words)) for seed, name in enumerate(names)}


def unlike_loras(folder: Path) -> dict[str, str]:
    """Three that differ in rank, alpha, rsLoRA and targets."""
    return {
        "a": str(save_lora(folder / "a", 0, r=2, lora_alpha=7, target_modules=["q_proj", "v_proj"])),
        "b": str(save_lora(folder / "b", 1, r=5, use_rslora=True)),
        "c": str(
            save_lora(
                folder / "c",
                2,
                r=3,
                target_modules=["up_proj", "q_proj"],
                rank_pattern={"up_proj": 1},
                alpha_pattern={"up_proj": 9},
            )
        ),
    }
