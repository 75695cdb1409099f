"""The cost model says what is counted, and its page what the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.speed import shapes
from eval.speed.cost import MODELS, Block, renewed
from eval.speed.counting import count
from eval.speed.shapes import FEED_FORWARD, SHAPES

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"


@pytest.mark.parametrize(
    ("shape", "batch", "length", "words"),
    [
        ("SmolLM2-135M", 4, 1024, {}),
        ("SmolLM2-135M", 1, 333, {"num_experts": 5, "top_k": 3, "r": 7, "lora_alpha": 14, "lora_dropout": 0.0}),
        ("Llama-3-8B", 8, 1024, {"num_experts": 64}),
    ],
)
def test_the_model_says_what_is_counted(shape: str, batch: int, length: int, words: dict[str, Any]) -> None:
    sizes = SHAPES[shape][1]
    block = Block(
        hidden=sizes["hidden_size"],
        inner=sizes["intermediate_size"],
        tokens=batch * length,
        experts=words.get("num_experts", 8),
        top_k=words.get("top_k", 2),
        rank=words.get("r", 16),
        dropout="lora_dropout" not in words,
    )
    base = shapes.base(shape)
    adapted = shapes.mixture(base, "mixlora", **words)
    peer = shapes.lora(base, shapes.ranks_of(adapted), shapes.dropout_of(adapted))
    mine, theirs = (count(each.model, each.forward(FEED_FORWARD, batch, length)) for each in (adapted, peer))
    assert block.mixture_flops == mine.flops
    assert block.lora_flops == theirs.flops
    assert block.mixture_saved == pytest.approx(mine.saved, rel=0.01)
    assert block.lora_saved == pytest.approx(theirs.saved, rel=0.001)
    experts = [p for name, p in adapted.model.named_parameters() if ".mlp." in name and "moelora_" in name]
    assert block.adapter_parameters == sum(p.numel() for p in experts)


def test_the_page_has_the_tables_of_today() -> None:
    assert renewed(PAGE.read_text()) == PAGE.read_text()


def test_a_page_without_a_table_is_refused() -> None:
    with pytest.raises(SystemExit, match="0 tables 'growth'"):
        renewed("no tables")


def test_the_models_are_those_of_the_shapes() -> None:
    sizes = SHAPES["Llama-3-8B"][1]
    assert (MODELS[0].hidden, MODELS[0].inner) == (sizes["hidden_size"], sizes["intermediate_size"])
