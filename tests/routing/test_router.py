"""The router: which tensors and dropouts its choices give it, the precision it decides in, and the decision's views."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from moelora.choices import Init, Param, Site
from moelora.errors import ConfigError
from moelora.routing.router import Router
from moelora.scores.linear import Activation, LinearScores
from moelora.selection.dense import Dense
from moelora.selection.learned_threshold import LearnedThreshold
from moelora.selection.top_k import TopK
from tests.routing.golden import LOGITS_TE, MIXLORA_WEIGHTS_TK, TOP2_IDS_TK, golden_routing, router_of
from tests.routing.routers import BIASED, SOFTMAX, bias_of, every_token, new_router, site_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_decisions_are_those_of_fp32(dtype: torch.dtype, activation: Activation) -> None:
    """bf16 tokens and weights, under autocast: the decision is fp32 math on the same numbers."""
    scores = LinearScores(activation=activation, init_std=1.0)
    router = new_router(TopK(k=2), scores, in_features=300, num_experts=8).to(dtype)
    x_TD = torch.randn(63, 300).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD, every_token(1, 63))
    exact = copy.deepcopy(router).float()(x_TD.float(), every_token(1, 63))
    assert routing.weights_TK.dtype == routing.probs_TE.dtype == torch.float32
    for name in ("logits_TE", "probs_TE", "weights_TK", "ids_TK"):
        assert torch.equal(getattr(routing, name), getattr(exact, name)), name


def test_gates_are_the_weights_at_the_chosen_experts() -> None:
    routing = golden_routing(TopK(k=2))
    expected_TE = torch.zeros(3, 4)
    for t in range(3):
        for k in range(2):
            expected_TE[t, TOP2_IDS_TK[t, k]] = MIXLORA_WEIGHTS_TK[t, k]
    torch.testing.assert_close(routing.gates_TE(), expected_TE, rtol=0, atol=1e-6)
    assert routing.num_experts == 4
    assert routing.num_choices == 2


@pytest.mark.parametrize("trainable", [True, False])
def test_a_router_that_is_not_trained_is_saved_all_the_same(trainable: bool) -> None:
    router = new_router(TopK(), LinearScores(trainable=trainable))
    assert [p.requires_grad for p in router.parameters()] == [trainable]
    assert list(router.state_dict()) == ["weight"]
    assert router.is_trained() == trainable


@pytest.mark.parametrize(
    ("scores", "selection", "names"),
    [
        (SOFTMAX, TopK(), ["weight"]),
        (BIASED, TopK(), ["weight", "bias"]),
        (SOFTMAX, Dense(), ["weight"]),
        (SOFTMAX, LearnedThreshold(), ["weight", "threshold_weight", "threshold_bias"]),
    ],
)
def test_it_holds_the_tensors_of_its_choices_and_no_others(
    scores: LinearScores, selection: TopK, names: list[str]
) -> None:
    router = new_router(selection, scores)
    assert list(router.state_dict()) == names == list(router.pieces)
    assert not list(router.buffers()), "tools that copy an adapter copy parameters only"


@dataclass(frozen=True, kw_only=True)
class OwnsAWeight(TopK):
    """A selection with a tensor of a name that the scores have too."""

    kind: ClassVar[str] = "owns_a_weight"

    def params(self, site: Site) -> list[Param]:
        return [Param("weight", (1, site.router_features), Init("zeros"))]


def test_two_choices_cannot_own_one_name() -> None:
    with pytest.raises(ConfigError, match="'linear' scores and 'owns_a_weight' selection both own one of"):
        Router(site_of(12, 4), SOFTMAX, OwnsAWeight())


def test_the_initial_weight() -> None:
    def weight(init_std: float | None) -> torch.Tensor:
        router = new_router(TopK(), LinearScores(init_std=init_std), in_features=wide, num_experts=8)
        return router.get_parameter("weight").detach()

    wide = 5000
    assert abs(float(weight(0.02).std()) - 0.02) < 1e-3
    bound = 1 / math.sqrt(wide)
    assert 0.99 * bound < float(weight(None).abs().max()) <= bound
    assert weight(0.0).abs().max() == 0


def test_the_bias_stays_fp32() -> None:
    """Steps of 1e-5 would be rounded away in half precision."""
    router = new_router(TopK(), BIASED)
    bias_of(router).copy_(torch.tensor([-1e-5, 1e-5, 3e-5, 1.00001]))
    before = bias_of(router).clone()
    for cast in (router.bfloat16(), router.half(), router.to(torch.bfloat16)):
        assert bias_of(cast).dtype == torch.float32
        assert torch.equal(bias_of(cast), before)
        assert cast.get_parameter("weight").dtype != torch.float32
        assert not cast.get_parameter("bias").requires_grad


def test_state_round_trip() -> None:
    router = new_router(TopK(), BIASED)
    bias_of(router).normal_()
    assert set(router.state_dict()) == {"weight", "bias"}
    other = new_router(TopK(), BIASED)
    other.load_state_dict(router.state_dict())
    for name, tensor in router.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_a_router_without_bias_has_none() -> None:
    router = new_router(TopK())
    assert not hasattr(router, "bias")
    assert "bias" not in router.state_dict()


def test_replaced_tensors_are_used_in_place_of_its_own() -> None:
    router = router_of(TopK(k=2), BIASED)
    replaced = router(LOGITS_TE, every_token(1, 3), {"bias": torch.tensor([0.0, 0.0, 0.0, 0.9])})
    assert replaced.ids_TK[0].tolist() == [3, 0]
    own = router(LOGITS_TE, every_token(1, 3))
    assert own.ids_TK.tolist() == TOP2_IDS_TK.tolist()


def test_its_dropouts_are_modules_that_can_be_switched_off() -> None:
    router = router_of(TopK(k=2, expert_dropout=0.5)).train()
    found = [module for module in router.modules() if isinstance(module, nn.Dropout)]
    assert [module.p for module in found] == [0.5]
    assert router(LOGITS_TE, every_token(1, 3)).assigned_TK is not None
    found[0].p = 0.0
    assert router(LOGITS_TE, every_token(1, 3)).assigned_TK is None


def test_whether_a_decision_depends_on_the_batch() -> None:
    assert new_router(TopK(capacity_factor=1.0)).reads_batch
    for selection in (TopK(), Dense(), LearnedThreshold()):
        assert not new_router(selection).reads_batch


def test_repr_says_how_it_routes() -> None:
    text = repr(new_router(TopK(k=3)))
    assert "linear(activation=softmax" in text
    assert "top_k(k=3" in text
