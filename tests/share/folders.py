"""A folder of everything that can be uploaded, on a tiny base model of the loopback Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moelora.compose import from_loras
from moelora.export import distill_lora, export_loras, to_native_moe, write_mixlora
from moelora_cli import main
from tests.adapters import shake, small_config
from tests.runs.tiny import tiny_folder

BASE = "tester/base"
PROMPT = "What is 12 + 30?"
NAMES = ("maths", "code words", "prose")


def base_on_hub(folder: Path) -> None:
    """Put the base model and its tokenizer onto the Hub."""
    tiny_folder(folder)
    for part in (AutoModelForCausalLM, AutoTokenizer):
        part.from_pretrained(folder).push_to_hub(BASE)


def base() -> Any:
    """The base model."""
    return AutoModelForCausalLM.from_pretrained(BASE)


def lora(folder: Path, seed: int, card: str | None = None, **words: Any) -> Path:
    """Save a PEFT LoRA that changes the outputs.

    Args:
        folder: Where.
        seed: Of its weights.
        card: Its README.md.
        **words: Of its configuration.
    """
    words = {"r": 2 + seed % 2, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], **words}
    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **words))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    # PEFT's own card is a template
    (folder / "README.md").unlink(missing_ok=True)
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def composed(folder: Path, router: Any = "uniform", **words: Any) -> PeftModel:
    """Compose three LoRAs and save the result in `folder / "composition"`."""
    loras = {name: lora(folder / "loras" / name, seed) for seed, name in enumerate(NAMES)}
    model = from_loras(base(), loras, router, **words)
    model.save_pretrained(str(folder / "composition"), save_embedding_layers=False)
    return model


def rows() -> dict[str, list[dict[str, list[int]]]]:
    """Tokenised rows of each expert."""
    return {name: [{"input_ids": [10 + 20 * e + n, 11 + e, 12]} for n in range(2)] for e, name in enumerate(NAMES)}


def _trained(folder: Path) -> PeftModel:
    model = get_peft_model(base(), small_config("mixlora", lora_alpha=4)).eval()
    shake(model)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return model


def composition(folder: Path) -> tuple[Path, Any]:
    """An adapter."""
    model = composed(folder, "arrow")
    return folder / "composition", model


def edited(folder: Path) -> tuple[Path, Any]:
    """A composition without one of its experts."""
    composed(folder, "uniform")
    assert main(["expert", "drop", str(folder / "composition"), "--experts", "1", "-o", str(folder / "edited")]) == 0
    return folder / "edited", PeftModel.from_pretrained(base(), folder / "edited")


def loras(folder: Path) -> tuple[Path, Any]:
    """A mixture by centroids as LoRAs."""
    model = composed(folder, {"kind": "centroids", "unknown": False}, examples=rows())
    return export_loras(folder / "composition", folder / "my loras"), model


def distilled(folder: Path) -> tuple[Path, Any]:
    """A mixture as one LoRA."""
    _trained(folder)
    distill_lora(folder / "adapter", folder / "distilled", rank=2)
    return folder / "distilled", PeftModel.from_pretrained(base(), folder / "distilled")


def mixlora(folder: Path) -> tuple[Path, Any]:
    """An adapter in the format of MixLoRA's authors."""
    model = _trained(folder)
    return write_mixlora(folder / "adapter", folder / "theirs"), model


def native(folder: Path) -> tuple[Path, Any]:
    """An adapter and its base as one model, in several files."""
    model = _trained(folder)
    return to_native_moe(folder / "adapter", folder / "moe", max_shard_size=40_000).folder, model


KINDS: dict[str, Callable[[Path], tuple[Path, Any]]] = {
    each.__name__: each for each in (composition, edited, loras, distilled, mixlora, native)
}
"""What makes each folder and the model that it has to equal."""


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """The logits of the prompt."""
    ids = AutoTokenizer.from_pretrained(BASE)(PROMPT, return_tensors="pt").input_ids
    found: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found
