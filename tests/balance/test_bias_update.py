"""SMoRA's move of the routers' biases: the golden value and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelora import MoeLoraConfig
from moelora.balance.bias_update import BiasUpdate
from moelora.choices import kinds
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.selection.top_k import TopK
from tests.balance.layers import Layers, loss_of
from tests.routing.golden import SMORA_BIAS_SIGN_E, TOP2_IDS_TK, golden_routing
from tests.routing.routers import BIASED


def test_smora_golden() -> None:
    load_E = golden_routing(TopK(k=2), BIASED).load_TE().sum(0)
    bias_E = BiasUpdate(coef=1e-5).move(load_E)
    torch.testing.assert_close(bias_E, 1e-5 * SMORA_BIAS_SIGN_E, rtol=1e-6, atol=0)
    expected = reference.bias_update(torch.zeros(4), TOP2_IDS_TK, 1e-5)
    torch.testing.assert_close(bias_E, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("load_E", [[4.0, 4.0, 4.0], [7.0, 4.0, 1.0], [12.0, 0.0, 0.0]], ids=str)
def test_equals_the_reference(load_E: list[float]) -> None:
    bias_E = torch.tensor([0.1, -0.2, 0.0])
    ids_TK = torch.tensor([[e] for e, count in enumerate(load_E) for _ in range(int(count))])
    expected = reference.bias_update(bias_E, ids_TK, 0.01)
    moves_LE = BiasUpdate(coef=0.01).move(torch.tensor([load_E, load_E[::-1]]))
    torch.testing.assert_close(bias_E + moves_LE[0], expected)
    torch.testing.assert_close(moves_LE[1], moves_LE[0].flip(0))


def test_it_adds_no_loss() -> None:
    assert not BiasUpdate(coef=0.1).has_loss
    assert BiasUpdate(coef=0.1).moves_bias
    assert not BiasUpdate(coef=0.0).moves_bias
    assert loss_of(BiasUpdate(coef=0.1), *Layers.routed("sigmoid").records()).item() == 0


def test_no_other_choice_moves_a_bias() -> None:
    known: dict[str, Any] = dict(kinds("balance"))
    assert [kind for kind, choice in known.items() if choice(coef=0.1).moves_bias] == ["bias_update"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "moves a bias that 'linear' scores do not have; allowed: scores with bias=True"),
        (
            {"scores": {"kind": "linear", "bias": True}, "selection": "dense"},
            "with dense selection all experts get all",
        ),
    ],
)
def test_it_needs_a_bias_and_choices_to_count(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(balance={"kind": "bias_update", "coef": 1e-3}, **words)
