"""What a batch says of the tokens of a layer's input: padding, sequences, and facts of the sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelora.errors import ConfigError
from moelora.routing.batch import Batch, Tokens, find_sequences

PLAIN = nn.Module()


def of_call(**inputs: Any) -> Batch:
    """The batch of a call of a decoder."""
    return Batch.of_call(PLAIN, (), inputs, None, {})


def sequences(batch: Batch, B: int, S: int) -> list[int]:
    """The number of the sequence of each token."""
    return batch.tokens(torch.zeros(B, S, 4)).sequence_T().tolist()


def test_shapes_without_sequences() -> None:
    mask_BS = torch.tensor([[True, True, False], [True, False, False]])
    batch = Batch(mask_BS)
    assert torch.equal(batch.tokens(torch.zeros(6, 4)).valid_BS, mask_BS)
    assert batch.tokens(torch.zeros(5, 4)).valid_BS.shape == (5, 1)
    assert batch.tokens(torch.zeros(4, 3, 4)).valid_BS.all()
    assert batch.tokens(torch.zeros(2, 5, 7, 4)).valid_BS.shape == (2, 35)


def test_a_longer_mask_is_cut_only_with_a_cache() -> None:
    """Speech encoders take masks of samples but compute on far fewer frames, which the mask's end does not describe."""
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    plain = of_call(attention_mask=mask)
    assert plain.tokens(torch.zeros(1, 3, 4)).valid_BS.tolist() == [[True, True, True]]
    cached = of_call(attention_mask=mask, past_key_values=object())
    assert cached.tokens(torch.zeros(1, 3, 4)).valid_BS.tolist() == [[True, False, False]]


def test_masks_of_attention_are_no_padding_masks() -> None:
    batch = of_call(attention_mask=torch.zeros(2, 1, 3, 3))
    assert batch.mask_BS is None
    assert batch.tokens(torch.zeros(2, 3, 4)).valid_BS.all()


# --- where sequences begin ---


def test_each_row_is_a_sequence_where_nothing_says_otherwise() -> None:
    assert sequences(Batch(), 2, 3) == [0, 0, 0, 1, 1, 1]
    assert sequences(of_call(attention_mask=torch.ones(2, 3)), 2, 3) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("with_mask", [False, True])
def test_position_ids_tell_packed_sequences_apart(with_mask: bool) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    inputs: dict[str, Tensor] = {"position_ids": positions}
    if with_mask:
        inputs["attention_mask"] = torch.ones(2, 6, dtype=torch.long)
    assert sequences(of_call(**inputs), 2, 6) == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3]


def test_a_sequence_that_goes_on_from_the_row_before_begins_anew() -> None:
    """Rows are apart, whatever positions they start with; and a fall begins a sequence that was cut at its front."""
    assert sequences(of_call(position_ids=torch.tensor([[0, 1, 2], [3, 4, 5], [6, 2, 3]])), 3, 3) == [
        *(0, 0, 0),
        *(1, 1, 1),
        *(2, 3, 3),
    ]


@pytest.mark.parametrize("pads", [[0, 0], [1, 1], [5, 6], [0, 1]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_positions_of_padding_mean_nothing(side: str, pads: list[int]) -> None:
    """As `generate`, collators and models write them: zeros, ones, or counting on."""
    own, mask = [0, 1, 2], [1, 1, 1]
    if side == "left":
        positions, masks = [[*pads, *own], [0, 1, 2, 3, 4]], [[0, 0, *mask], [1] * 5]
    else:
        positions, masks = [[*own, *pads], [0, 1, 2, 3, 4]], [[*mask, 0, 0], [1] * 5]
    batch = of_call(position_ids=torch.tensor(positions), attention_mask=torch.tensor(masks))
    tokens = batch.tokens(torch.zeros(2, 5, 4))
    assert tokens.sequence_T().tolist() == [0] * 5 + [1] * 5
    assert tokens.valid_BS.tolist() == torch.tensor(masks).bool().tolist()
    first_T, last_T = tokens.bounds_T()
    assert first_T.tolist() == [0] * 5 + [5] * 5
    assert last_T.tolist() == [4] * 5 + [9] * 5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cu_seq_lens_tell_the_sequences_of_a_padding_free_batch_apart(dtype: torch.dtype) -> None:
    ends = torch.tensor([0, 3, 4, 9], dtype=dtype)
    batch = of_call(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=5, max_length_k=5)
    assert sequences(batch, 1, 9) == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    flat = batch.tokens(torch.zeros(9, 4))
    assert flat.sequence_T().tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    first_T, last_T = flat.bounds_T()
    assert first_T.tolist() == [0, 0, 0, 3, 4, 4, 4, 4, 4]
    assert last_T.tolist() == [2, 2, 2, 3, 8, 8, 8, 8, 8]
    assert flat.valid_T.all()


def test_cu_seq_lens_win_over_position_ids() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    batch = of_call(position_ids=positions, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    assert sequences(batch, 1, 5) == [0, 0, 1, 1, 1]


def test_with_a_cache_a_row_is_a_sequence() -> None:
    """The positions of a step go on from those in the cache."""
    inputs = {"attention_mask": torch.ones(2, 8), "position_ids": torch.tensor([[7], [5]])}
    batch = of_call(past_key_values=object(), **inputs)
    assert sequences(batch, 2, 1) == [0, 1]


def test_positions_of_another_shape_say_nothing() -> None:
    """Qwen-VL has three of them for each token, and a vision tower's are about patches."""
    three = torch.zeros(3, 2, 5, dtype=torch.long)
    assert sequences(of_call(position_ids=three, attention_mask=torch.ones(2, 5)), 2, 5) == [0] * 5 + [1] * 5
    short = torch.zeros(2, 4, dtype=torch.long)
    assert sequences(of_call(position_ids=short, attention_mask=torch.ones(2, 5)), 2, 5) == [0] * 5 + [1] * 5


def test_a_part_of_the_model_inherits_what_is_about_its_tokens() -> None:
    outer = of_call(position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
    backbone = Batch.of_call(PLAIN, (), {"inputs_embeds": torch.zeros(1, 5, 4)}, outer, {})
    assert sequences(backbone, 1, 5) == [0, 0, 1, 1, 1]
    tower = Batch.of_call(PLAIN, (), {"pixel_values": torch.zeros(1, 5, 4)}, outer, {})
    assert sequences(tower, 1, 5) == [0] * 5


# --- facts ---


def test_a_fact_is_given_for_each_sequence() -> None:
    tokens = Tokens(torch.ones(2, 3, dtype=torch.bool), facts={"task_ids": torch.tensor([7, 4])})
    assert tokens.fact_T("task_ids").tolist() == [7, 7, 7, 4, 4, 4]
    embedding = torch.randn(2, 5)
    tokens = Tokens(torch.ones(2, 3, dtype=torch.bool), facts={"instance_embedding": embedding})
    assert torch.equal(tokens.fact_T("instance_embedding"), embedding.repeat_interleave(3, 0))


def test_a_fact_is_given_for_each_packed_sequence() -> None:
    facts = {"task_ids": torch.tensor([7, 4, 9])}
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    batch = Batch(sequence_BS=find_sequences(positions, None, None), facts=facts)
    assert batch.tokens(torch.zeros(2, 4, 3)).fact_T("task_ids").tolist() == [7, 7, 4, 4, 9, 9, 9, 9]


def test_beams_and_returned_sequences_have_the_fact_of_their_prompt() -> None:
    tokens = Tokens(torch.ones(6, 2, dtype=torch.bool), facts={"task_ids": torch.tensor([7, 4])})
    assert tokens.fact_T("task_ids").tolist() == [7] * 6 + [4] * 6


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_fact_that_does_not_fit_is_refused(count: int) -> None:
    tokens = Tokens(torch.ones(4, 2, dtype=torch.bool), facts={"task_ids": torch.zeros(count)})
    with pytest.raises(ConfigError, match=f"task_ids has {count} entries for 4 sequences"):
        tokens.fact_T("task_ids")


def test_a_fact_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"routes by task_ids, which the batch does not have.*batch_facts\(task_ids="):
        Batch().tokens(torch.zeros(1, 2, 3)).fact_T("task_ids")


def test_facts_of_some_rows() -> None:
    """As for a batch whose samples have adapters of their own."""
    tokens = Tokens(torch.tensor([[1, 1], [1, 0], [0, 1]]).bool(), facts={"task_ids": torch.tensor([7, 4, 9])})
    some = tokens.rows([2, 0])
    assert some.valid_BS.tolist() == [[False, True], [True, True]]
    assert some.fact_T("task_ids").tolist() == [9, 9, 7, 7]


def test_beams_of_some_rows() -> None:
    tokens = Tokens(torch.ones(4, 1, dtype=torch.bool), facts={"task_ids": torch.tensor([7, 4])})
    assert tokens.rows([3, 0]).fact_T("task_ids").tolist() == [4, 7]


def test_packed_sequences_of_some_rows() -> None:
    facts = {"task_ids": torch.tensor([7, 4, 9, 5])}
    positions = torch.tensor([[0, 1, 0], [0, 1, 2], [0, 1, 2]])
    batch = Batch(sequence_BS=find_sequences(positions, None, None), facts=facts)
    some = batch.tokens(torch.zeros(3, 3, 4)).rows([2, 0])
    assert some.sequence_T().tolist() == [0, 0, 0, 1, 1, 2]
    assert some.fact_T("task_ids").tolist() == [5, 5, 5, 7, 7, 4]
