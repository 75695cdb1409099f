"""The models and the rows that presets are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moelora.runs.config import load_config
from moelora.runs.data import load_rows, with_task_ids
from moelora.runs.models import DEMO_MODEL, ModelSource, load_model, load_tokenizer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
"""Whose tasks presets are tried on."""
TRAIN_SEED, HELD_OUT_SEED = 0, 500_000
_SOURCE = ModelSource(DEMO_MODEL, "bfloat16", {"attn_implementation": "eager"})


@dataclass(frozen=True)
class Base:
    """A frozen model that presets are tried on.

    Args:
        name: What the table calls it.
        make: Makes it, with random weights always the same ones.
        task_type: PEFT's.
    """

    name: str
    make: Callable[[Any], Any]
    task_type: str

    @property
    def is_classifier(self) -> bool:
        """Whether it says which task a prompt is of, in place of answering it."""
        return self.task_type == "SEQ_CLS"


def _smollm2(tokenizer: Any) -> Any:
    return load_model(_SOURCE)


def _encoder(tokenizer: Any) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=len(tasks()),
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForSequenceClassification(config).to(torch.bfloat16)


def _moe(tokenizer: Any) -> Any:
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return OlmoeForCausalLM(config).to(torch.bfloat16)


SMOLLM2 = Base("SmolLM2-135M-Instruct", _smollm2, "CAUSAL_LM")
ENCODER = Base("random BERT, 6 layers", _encoder, "SEQ_CLS")
MOE = Base("random OLMoE, 4 layers", _moe, "CAUSAL_LM")

_OTHERS = {"soft_moa": ENCODER, "mixda": ENCODER, **dict.fromkeys(("perft_r", "perft_e", "perft_d", "perft_s"), MOE)}


def base_of(preset: str) -> Base:
    """The model that a preset is tried on: the real one, unless the method is for another architecture."""
    return _OTHERS.get(preset, SMOLLM2)


def tasks() -> list[str]:
    """The names of the quickstart's tasks."""
    return list(load_config(QUICKSTART).dataset.tasks or {})


def tokenizer() -> Any:
    """The real model's tokenizer, which the random models have too."""
    return load_tokenizer(_SOURCE)


def rows_of(base: Base, tokenizer: Any, rows_per_task: int, seed: int) -> Any:
    """Rows with the number of their task; of a classifier, tokens and labels.

    Args:
        base: The model that they are for.
        tokenizer: Its tokenizer.
        rows_per_task: How many of each task.
        seed: Their seed.
    """
    words = replace(load_config(QUICKSTART).dataset, rows_per_task=rows_per_task, seed=seed)
    rows = with_task_ids(load_rows(words, tokenizer), words)
    if not base.is_classifier:
        return rows

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {**tokenizer(row["prompt"][-1]["content"]), "labels": row["task_ids"]}

    return rows.map(encode, remove_columns=[name for name in rows.column_names if name != "task_ids"])
