"""Saved adapters to edit, and what they compute once they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora import MoeLoraConfig
from moelora.layers.base import MoeLoraLayer
from tests.adapters import adapted, shake
from tests.conftest import VOCAB, tiny_model

FEATURES = 36


def saved(folder: Path, preset: str, **words: Any) -> Path:
    """A folder with an adapter of a tiny Llama that changes its outputs."""
    adapted(preset, **words).save_pretrained(folder)
    return forget_base(folder)


def forget_base(folder: Path) -> Path:
    """Leave out of an adapter what its base was: it is used on a tiny model of another vocabulary too."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_fingerprint": None}))
    return folder


def saved_by_sequence(folder: Path, **words: Any) -> Path:
    """The same, of three named experts that whole sequences go to by the centroids of their prompts."""
    config = MoeLoraConfig(
        experts={
            "kind": "lora_composed",
            "num_experts": 3,
            "r": 3,
            "lora_alpha": 3,
            "names": ["one", "two", "three"],
            "ranks": [3, 2, 3],
            "sources": [{"source": "a"}, {"source": "b"}, {"source": "c"}],
        },
        placement={"kind": "linear", "routers": "per_model"},
        scores={"kind": "centroids", "features": FEATURES, "embedding": "input"},
        selection="nearest",
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        **words,
    )
    model = get_peft_model(tiny_model(), config)
    shake(model)
    router = next(layer for layer in model.modules() if isinstance(layer, MoeLoraLayer)).routers["default"]
    with torch.no_grad():
        keys = tiny_model().get_input_embeddings()(texts(3, seed=7)).mean(1)
        router.get_parameter("centroids").copy_(keys)
        router.get_parameter("center").copy_(keys.mean(0, keepdim=True))
    model.save_pretrained(folder)
    return forget_base(folder)


def loaded(folder: Path, **words: Any) -> Any:
    """A tiny Llama with a saved adapter, in eval mode unless it is to be trained."""
    model = PeftModel.from_pretrained(tiny_model(), str(folder), **words)
    return model.train() if words.get("is_trainable") else model.eval()


def texts(count: int = 12, length: int = 7, seed: int = 3) -> Tensor:
    """Sequences of tokens [count, length]."""
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> list[Tensor]:
    """Logits of each sequence, run by itself."""
    return [model(input_ids=row.unsqueeze(0)).logits for row in ids]


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter."""
    found: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def change_weights(folder: Path, changes: dict[str, Tensor]) -> None:
    """Replace tensors of a saved adapter."""
    save_file({**weights(folder), **changes}, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def train(model: Any, ids: Tensor, steps: int = 3) -> None:
    """A few steps with a weight decay, which moves whatever an optimizer holds."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
