"""Packed and padding-free rows: a capacity is of a sequence, wherever the sequence stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora import record_routing
from tests.adapters import adapted

TIGHT: dict[str, Any] = {"capacity_factor": 0.5, "expert_dropout": 0.0, "lora_alpha": 12}
LENGTHS = (9, 14, 5)
ATOL = 1e-5


def sequences(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator) for length in lengths]


def positions(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.arange(len(part)) for part in parts])


def boundaries(parts: list[Tensor]) -> dict[str, Any]:
    """What TRL and transformers hand to flash attention of a padding-free row."""
    lengths = torch.tensor([len(part) for part in parts])
    ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def apart(model: Any, parts: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])


@pytest.mark.parametrize("flash", [False, True], ids=["position_ids", "with cu_seq_lens"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_padding_free_row_gives_what_its_sequences_give(name: str, flash: bool) -> None:
    model = adapted("sira", name, **TIGHT).train()
    parts = sequences()
    words = boundaries(parts) if flash else {}
    packed = model(input_ids=torch.cat(parts)[None], position_ids=positions(parts)[None], use_cache=False, **words)
    torch.testing.assert_close(packed.logits[0], apart(model, parts), atol=ATOL, rtol=1e-5)


def test_several_packed_rows() -> None:
    """Two rows of the same length, cut at different places."""
    model = adapted("sira", **TIGHT).train()
    rows = [sequences((9, 14), seed=1), sequences((17, 6), seed=2)]
    packed = model(
        input_ids=torch.stack([torch.cat(parts) for parts in rows]),
        position_ids=torch.stack([positions(parts) for parts in rows]),
        use_cache=False,
    ).logits
    for logits, parts in zip(packed, rows, strict=True):
        torch.testing.assert_close(logits, apart(model, parts), atol=ATOL, rtol=1e-5)


def dropped_choices(model: Any, **inputs: Any) -> Tensor:
    """Which choices of the first mixture the capacity dropped; its input does not depend on attention."""
    with record_routing(model) as recorder:
        model(**inputs, use_cache=False)
    first = recorder.records[0]
    assert first.layer.endswith("q_proj")
    return first.routing.weights_TK == 0


def test_boundaries_are_read_from_cu_seq_lens_alone() -> None:
    model = adapted("sira", **TIGHT).train()
    parts = sequences()
    expected = torch.cat([dropped_choices(model, input_ids=part[None]) for part in parts])
    found = dropped_choices(model, input_ids=torch.cat(parts)[None], **boundaries(parts))
    assert expected.any()
    assert not expected.all()
    assert torch.equal(found, expected)
    assert not torch.equal(dropped_choices(model, input_ids=torch.cat(parts)[None]), expected)


def test_position_ids_that_only_go_on_are_one_sequence() -> None:
    model = adapted("sira", **TIGHT).train()
    input_ids = torch.cat(sequences())[None]
    expected = dropped_choices(model, input_ids=input_ids)
    assert torch.equal(dropped_choices(model, input_ids=input_ids, position_ids=torch.arange(28)[None]), expected)
    assert torch.equal(dropped_choices(model, input_ids=input_ids, position_ids=torch.arange(7, 35)[None]), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_with_position_ids_are_one_sequence_each(side: str) -> None:
    """As generation makes them: positions of padding repeat, but they begin no sequence."""
    model = adapted("sira", **TIGHT).train()
    part = sequences((13,))[0]
    expected = dropped_choices(model, input_ids=part[None])
    zeros, ones = torch.zeros(4, dtype=torch.long), torch.ones(13, dtype=torch.long)
    order = (zeros, part) if side == "left" else (part, zeros)
    mask = torch.cat((zeros, ones) if side == "left" else (ones, zeros))
    found = dropped_choices(
        model,
        input_ids=torch.cat(order)[None],
        attention_mask=mask[None],
        position_ids=(mask.cumsum(0) - 1).clamp_min(0)[None],
    )
    assert torch.equal(found[mask.bool()], expected)
