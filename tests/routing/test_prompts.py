"""The mean over a prompt, of which the earlier turns of a conversation may be left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.routing.batch import Batch
from moelora.routing.prompts import mean_of_prompts

OPENING = [8, 9]
CONVERSATIONS = [
    [1, 2, 8, 9, 3, 4, 5, 8, 9, 6],  # two turns after a system prompt
    [8, 9, 3, 5, 8, 9, 4, 5, 8, 9, 6, 7],  # three turns
    [1, 8, 9, 3, 4],  # one turn
    [3, 9, 8, 4],  # no opening: the ids in another order
    [8, 9],
    [8, 9, 8, 9],  # an empty turn
]


def kept(ids: Sequence[int], opening: Sequence[int]) -> list[int]:
    """The places that count, by a loop."""
    opens = [i for i in range(len(ids)) if opening and list(ids[i : i + len(opening)]) == list(opening)]
    return [i for i in range(len(ids)) if len(opens) < 2 or i < opens[0] or i >= opens[-1]]


def naive(states_SD: Tensor, ids: Sequence[int], opening: Sequence[int]) -> Tensor:
    return states_SD[kept(ids, opening)].mean(0)


def states(count: int, size: int) -> Tensor:
    return torch.randn(count, size, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("opening", [OPENING, [8], [9, 3, 4, 5, 8, 9, 6, 1, 1, 1, 1, 1, 1, 1], [77], []], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_earlier_turns_do_not_count_in_a_padded_batch(opening: list[int], side: str) -> None:
    size = max(map(len, CONVERSATIONS)) + 1
    ids_BS = torch.full((len(CONVERSATIONS), size), 8)  # padding that would make an opening with what is beside it
    mask_BS = torch.zeros_like(ids_BS)
    places = []
    for i, ids in enumerate(CONVERSATIONS):
        place = slice(size - len(ids), size) if side == "left" else slice(0, len(ids))
        ids_BS[i, place], mask_BS[i, place] = torch.tensor(ids), 1
        places.append(place)
    states_BSD = states(*ids_BS.shape)
    found = mean_of_prompts(states_BSD, Batch(mask_BS.bool()), None, ids_BS, opening)
    for i, ids in enumerate(CONVERSATIONS):
        torch.testing.assert_close(found[i], naive(states_BSD[i, places[i]], ids, opening))


def test_packed_sequences_are_apart() -> None:
    """An opening that two sequences would make together is none, nor do turns of one count for the other."""
    packed = [*CONVERSATIONS, [9, 3, 8, 9, 2]]  # [8, 9, 8, 9] comes before, then 9: no opening over the border
    packed[-2] = [8, 9, 4, 8]
    ids_BS = torch.tensor([[token for ids in packed for token in ids]])
    positions = torch.tensor([[i for ids in packed for i in range(len(ids))]])
    call: dict[str, Any] = {"input_ids": ids_BS, "position_ids": positions}
    batch = Batch.of_call(torch.nn.Module(), (), call, None, {})
    states_BSD = states(*ids_BS.shape)
    found = mean_of_prompts(states_BSD, batch, None, ids_BS, OPENING)
    assert len(found) == len(packed)
    start = 0
    for i, ids in enumerate(packed):
        torch.testing.assert_close(found[i], naive(states_BSD[0, start : start + len(ids)], ids, OPENING))
        start += len(ids)


def test_turns_of_the_answer_do_not_count() -> None:
    """With labels the prompt ends before the first one: what it then says of turns is the prompt's."""
    ids = [1, 8, 9, 3, 8, 9, 4, 8, 9, 5]
    labels = torch.tensor([[-100] * 7 + ids[7:]])
    states_BSD = states(1, len(ids))
    found = mean_of_prompts(states_BSD, Batch(torch.ones(1, len(ids)) > 0), labels, torch.tensor([ids]), OPENING)
    torch.testing.assert_close(found[0], naive(states_BSD[0, :7], ids[:7], OPENING))


def test_a_batch_of_embeddings_counts_whole() -> None:
    states_BSD = states(1, 4)
    found = mean_of_prompts(states_BSD, Batch(torch.ones(1, 4) > 0), None, None, OPENING)
    torch.testing.assert_close(found, states_BSD.mean(1))
