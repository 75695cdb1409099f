"""A tiny vision-language model and rows of which only some have an image: its vision tower runs only sometimes."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.adapters import shake, small_config
from tests.conftest import VOCAB

IMAGE_TOKEN = VOCAB - 1
NUM_PATCHES = 4
Row = dict[str, Tensor]


def tiny_llava() -> LlavaForConditionalGeneration:
    """Two layers in the tower and two in the language model, in eval mode."""
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        projection_dim=24,
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()


def adapted_llava(preset: str, **words: Any) -> Any:
    """The model with an adapter on both towers that changes its outputs."""
    model = get_peft_model(tiny_llava(), small_config(preset, target_modules="all-linear", **words))
    shake(model)
    return model.eval()


def mixed_rows(pattern: str, seed: int = 0) -> list[Row]:
    """One row for each letter of `pattern`: "i" has an image, "t" only text."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for letter in pattern:
        input_ids = torch.randint(3, IMAGE_TOKEN, (12,), generator=generator)
        row = {"input_ids": input_ids, "labels": input_ids.clone()}
        if letter == "i":
            input_ids[1 : 1 + NUM_PATCHES] = IMAGE_TOKEN
            row["labels"] = input_ids.masked_fill(input_ids == IMAGE_TOKEN, -100)
            row["pixel_values"] = torch.randn(3, 8, 8, generator=generator)
        rows.append(row)
    return rows


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """A batch; it has `pixel_values` only if a row has."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    images = [row["pixel_values"] for row in rows if "pixel_values" in row]
    if images:
        batch["pixel_values"] = torch.stack(images)
    return batch
