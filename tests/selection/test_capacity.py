"""The capacity of experts: the reference, padding, batch mates, and several sequences in one row.

Shape suffixes: B rows, S tokens of a row, T = B * S, E experts, K chosen experts of a token.
"""

from __future__ import annotations

import pytest
import torch

from moelora.ops import reference
from moelora.routing.batch import Batch, Tokens, find_sequences
from moelora.selection.capacity import within_capacity
from tests.routing.routers import every_token


def random_case(B: int, S: int, E: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    # skewed, so that a capacity is in fact exceeded
    scores_TE = torch.rand(B * S, E) + torch.linspace(0, 0.8, E)
    lengths_B = torch.randint(1, S + 1, (B,))
    lengths_B[0] = S
    return scores_TE.topk(K).indices, torch.arange(S) < lengths_B[:, None]


@pytest.mark.parametrize(
    ("B", "S", "E", "K"), [(1, 1, 1, 1), (1, 7, 3, 1), (2, 7, 3, 2), (3, 21, 8, 2), (4, 16, 16, 4)]
)
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.25, 2.0])
def test_within_capacity(B: int, S: int, E: int, K: int, factor: float) -> None:
    ids_TK, valid_BS = random_case(B, S, E, K)
    kept_TK = within_capacity(ids_TK, E, factor, Tokens(valid_BS))
    expected_BSK = reference.capacity_kept(ids_TK.view(B, S, K), E, factor, valid_BS)
    assert torch.equal(kept_TK.view(B, S, K)[valid_BS], expected_BSK[valid_BS])


def test_any_factor_above_0_has_room_for_one() -> None:
    kept_TK = within_capacity(torch.zeros(5, 1, dtype=torch.long), 4, 1e-6, Tokens(torch.ones(1, 5, dtype=torch.bool)))
    assert kept_TK.flatten().tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_a_capacity_of_a_fixed_number(capacity: int) -> None:
    """The count of a sequence's choices of an expert, first ones first, padding aside."""
    B, S, E, K = 3, 21, 4, 2
    ids_TK, valid_BS = random_case(B, S, E, K)
    kept_BSK = within_capacity(ids_TK, E, None, Tokens(valid_BS), capacity=capacity).view(B, S, K)
    for b in range(B):
        taken = [0] * E
        for k in range(K):
            for s in range(S):
                if valid_BS[b, s]:
                    expert = int(ids_TK.view(B, S, K)[b, s, k])
                    taken[expert] += 1
                    assert bool(kept_BSK[b, s, k]) == (taken[expert] <= capacity)


def test_capacity_is_exceeded_in_the_comparison() -> None:
    """Guards the test above: its cases must hold both kept and dropped choices."""
    ids_TK, valid_BS = random_case(3, 21, 8, 2)
    kept_TK = within_capacity(ids_TK, 8, 1.25, Tokens(valid_BS))[valid_BS.view(-1)]
    assert 0 < kept_TK.float().mean() < 1


def test_first_choices_come_before_second_ones() -> None:
    """Expert 0 has room for two: the first choices of the later tokens win over the second choice of the first."""
    ids_TK = torch.tensor([[1, 0], [0, 2], [0, 1]])
    kept_TK = within_capacity(ids_TK, 3, 1.0, every_token(1, 3))
    assert kept_TK.tolist() == [[True, False], [True, True], [True, True]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_capacity_ignores_padding_and_batch_mates(side: str) -> None:
    ids_TK, _ = random_case(1, 9, 4, 2)
    alone = within_capacity(ids_TK, 4, 1.0, every_token(1, 9))
    pad = torch.randint(0, 4, (5, 2))
    padded = torch.cat([pad, ids_TK] if side == "left" else [ids_TK, pad])
    mate = torch.randint(0, 4, (14, 2))
    valid_BS = torch.ones(2, 14, dtype=torch.bool)
    valid_BS[0, slice(0, 5) if side == "left" else slice(9, 14)] = False
    together = within_capacity(torch.cat([padded, mate]), 4, 1.0, Tokens(valid_BS))
    assert torch.equal(together[:14][valid_BS[0]], alone)


def test_choices_removed_by_expert_dropout_take_no_room() -> None:
    ids_TK = torch.tensor([[0], [0], [0]])
    assigned_TK = torch.tensor([[False], [True], [True]])
    # ceil(1 * 1 * 3 / 2) = 2 places
    assert within_capacity(ids_TK, 2, 1.0, every_token(1, 3)).squeeze(1).tolist() == [True, True, False]
    assert within_capacity(ids_TK, 2, 1.0, every_token(1, 3), assigned_TK).squeeze(1).tolist()[1:] == [True, True]


# --- several sequences in a row ---

LENGTHS = [[4, 9, 1, 7], [12, 3, 6], [21]]


def kept_apart(ids_TK: torch.Tensor, lengths: list[int], E: int, factor: float) -> torch.Tensor:
    """The reference on each sequence alone, one after the other."""
    parts = []
    for ids_SK in ids_TK.split(lengths):
        valid_BS = torch.ones(1, len(ids_SK), dtype=torch.bool)
        parts.append(reference.capacity_kept(ids_SK.unsqueeze(0), E, factor, valid_BS)[0])
    return torch.cat(parts)


@pytest.mark.parametrize("factor", [0.1, 0.75, 1.25])
@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens"])
def test_packed_sequences_have_a_capacity_each(by: str, factor: float) -> None:
    rows = LENGTHS if by == "position_ids" else [[length for row in LENGTHS for length in row]]
    lengths = [length for row in rows for length in row]
    T, E = sum(lengths), 5
    ids_TK = (torch.rand(T, E) + torch.linspace(0, 0.8, E)).topk(2).indices
    if by == "position_ids":
        positions = [torch.cat([torch.arange(length) for length in row]) for row in rows]
        batch = Batch(sequence_BS=find_sequences(torch.stack(positions), None, None))
    else:
        batch = Batch(sequence_BS=find_sequences(None, torch.tensor([0, *lengths]).cumsum(0), None))
    tokens = batch.tokens(torch.zeros(len(rows), T // len(rows), 3))
    kept_TK = within_capacity(ids_TK, E, factor, tokens)
    assert torch.equal(kept_TK, kept_apart(ids_TK, lengths, E, factor))
    assert 0 < kept_TK.float().mean() < 1
    one_row = within_capacity(ids_TK, E, factor, every_token(len(rows), T // len(rows)))
    assert not torch.equal(kept_TK, one_row), "the case does not tell sequences from rows"


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_sequences_beside_padding(side: str) -> None:
    """The padding takes no room from the sequence beside it, whatever positions it has."""
    lengths, pads, E = [6, 8], 4, 4
    ids_TK = (torch.rand(14, E) + torch.linspace(0, 0.8, E)).topk(2).indices
    padding_TK = torch.tensor([[E - 1, E - 2]]).expand(pads, 2)
    positions = torch.cat([torch.arange(6), torch.arange(8)])
    for pad_positions in (torch.zeros(pads), torch.ones(pads), torch.arange(pads)):
        parts = [(ids_TK, positions), (padding_TK, pad_positions.long())]
        ids, position_ids = (
            torch.cat(found) for found in zip(*(parts if side == "right" else parts[::-1]), strict=True)
        )
        valid_BS = torch.ones(1, 18, dtype=torch.bool)
        valid_BS[0, slice(14, 18) if side == "right" else slice(0, 4)] = False
        sequence_BS = find_sequences(position_ids.unsqueeze(0), None, valid_BS)
        tokens = Batch(valid_BS, sequence_BS=sequence_BS).tokens(torch.zeros(1, 18, 3))
        kept_TK = within_capacity(ids, E, 0.75, tokens)[valid_BS[0]]
        assert torch.equal(kept_TK, kept_apart(ids_TK, lengths, E, 0.75))
