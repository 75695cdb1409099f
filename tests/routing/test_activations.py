"""Top-k, renormalisation and capacity against the references.

Shape suffixes: B sequences, S tokens of a sequence, T = B * S, E experts, K chosen experts of a token.
"""

from __future__ import annotations

import pytest
import torch

from moelora.ops import reference
from moelora.routing.activations import renormalize, top_k_choice, within_capacity


@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (7, 3, 1), (7, 3, 3), (63, 8, 2), (7, 64, 8)])
@pytest.mark.parametrize("divide", [False, True], ids=["raw", "renormalized"])
def test_softmax_top_k(T: int, E: int, K: int, divide: bool) -> None:
    logits_TE = (3 * torch.randn(T, E)).requires_grad_()
    weights_TK, ids_TK = top_k_choice(logits_TE.softmax(-1), K)
    if divide:
        weights_TK = renormalize(weights_TK)
    expected_TK, expected_ids_TK = reference.softmax_top_k(logits_TE, K, divide)
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(T, K)
    (grad,) = torch.autograd.grad(weights_TK, logits_TE, upstream)
    (expected_grad,) = torch.autograd.grad(expected_TK, logits_TE, upstream)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_renormalised_top_k_is_the_softmax_over_the_chosen_logits() -> None:
    """Identity I7; it does not hold without renormalisation."""
    logits_TE = torch.randn(7, 8)
    chosen_TK = logits_TE.topk(3).values
    weights_TK, _ = top_k_choice(logits_TE.softmax(-1), 3)
    torch.testing.assert_close(renormalize(weights_TK), chosen_TK.softmax(-1), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights_TK, chosen_TK.softmax(-1))


def test_renormalising_nothing_gives_nothing() -> None:
    weights_TK = torch.zeros(2, 3, requires_grad=True)
    result = renormalize(weights_TK)
    assert torch.equal(result, torch.zeros(2, 3))
    result.sum().backward()
    assert weights_TK.grad is not None
    assert weights_TK.grad.isfinite().all()


def test_renormalising_a_negative_sum_is_a_division_too() -> None:
    """SMoRA's biased scores can be negative; a sum clamped from below would blow them up."""
    weights_TK = torch.tensor([[-0.1, -0.3], [0.1, -0.2]])
    expected = weights_TK / weights_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(renormalize(weights_TK), expected)


def test_ties_are_broken_alike_whatever_the_batch() -> None:
    row_E = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.2, 0.1, 0.05, 0.05])
    alone = top_k_choice(row_E.view(1, -1), 2)[1][0]
    for T in (2, 7, 63):
        scores_TE = torch.rand(T, 8)
        scores_TE[T // 2] = row_E
        assert torch.equal(top_k_choice(scores_TE, 2)[1][T // 2], alone)
    uniform = top_k_choice(torch.full((5, 8), 0.125), 2)[1]
    assert (uniform == uniform[0]).all()


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
    kept_TK = within_capacity(ids_TK, E, factor, valid_BS)
    expected_BSK = reference.capacity_kept(ids_TK.view(B, S, K), E, factor, valid_BS)
    assert torch.equal(kept_TK.view(B, S, K)[valid_BS], expected_BSK[valid_BS])


def test_capacity_is_exceeded_in_the_comparison() -> None:
    """Guards the test above: its cases must hold both kept and dropped choices."""
    ids_TK, valid_BS = random_case(3, 21, 8, 2)
    kept_TK = within_capacity(ids_TK, 8, 1.25, valid_BS)[valid_BS.view(-1)]
    assert 0 < kept_TK.float().mean() < 1


def test_first_choices_come_before_second_ones() -> None:
    """Expert 0 has room for two: the first choices of the later tokens win over the second choice of the first."""
    ids_TK = torch.tensor([[1, 0], [0, 2], [0, 1]])
    kept_TK = within_capacity(ids_TK, 3, 1.0, torch.ones(1, 3, dtype=torch.bool))
    assert kept_TK.tolist() == [[True, False], [True, True], [True, True]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_capacity_ignores_padding_and_batch_mates(side: str) -> None:
    ids_TK, _ = random_case(1, 9, 4, 2)
    alone = within_capacity(ids_TK, 4, 1.0, torch.ones(1, 9, dtype=torch.bool))
    pad = torch.randint(0, 4, (5, 2))
    padded = torch.cat([pad, ids_TK] if side == "left" else [ids_TK, pad])
    mate = torch.randint(0, 4, (14, 2))
    valid_BS = torch.ones(2, 14, dtype=torch.bool)
    valid_BS[0, slice(0, 5) if side == "left" else slice(9, 14)] = False
    together = within_capacity(torch.cat([padded, mate]), 4, 1.0, valid_BS)
    assert torch.equal(together[:14][valid_BS[0]], alone)


def test_choices_removed_by_expert_dropout_take_no_room() -> None:
    ids_TK = torch.tensor([[0], [0], [0]])
    valid_BS = torch.ones(1, 3, dtype=torch.bool)
    assigned_TK = torch.tensor([[False], [True], [True]])
    # ceil(1 * 1 * 3 / 2) = 2 places
    assert within_capacity(ids_TK, 2, 1.0, valid_BS).squeeze(1).tolist() == [True, True, False]
    assert within_capacity(ids_TK, 2, 1.0, valid_BS, assigned_TK).squeeze(1).tolist()[1:] == [True, True]
