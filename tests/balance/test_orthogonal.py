"""The loss that keeps the experts of a mixture apart: the reference, its bounds, and its share of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelora import MoeLoraConfig, balance_losses, record_routing
from moelora.balance.orthogonal import OrthogonalLoss
from moelora.errors import ConfigError
from moelora.ops import reference_options
from moelora.ops.factors import Factors
from tests.adapters import adapted, outputs, stacks, tuner_layers
from tests.balance.layers import Layers, loss_of
from tests.ops.compare import assert_close, gradients
from tests.training.runs import checkpointing_words, one_step

LOSS = OrthogonalLoss(coef=1.0)
WORDS: dict[str, Any] = {"balance": [{"kind": "orthogonal", "coef": 2.0}]}
BOTH: dict[str, Any] = {"balance": [{"kind": "switch", "coef": 1.0}, {"kind": "orthogonal", "coef": 2.0}]}


def of(a_ERD: torch.Tensor) -> torch.Tensor:
    return LOSS.of_experts(Factors(a_ERD, torch.zeros(len(a_ERD), 7, a_ERD.shape[1]), 1.0))


@pytest.mark.parametrize("shape", [(2, 1, 5), (4, 3, 12), (5, 2, 9)], ids=str)
def test_equals_the_reference(shape: tuple[int, ...]) -> None:
    leaves = {"A": torch.randn(shape, requires_grad=True)}
    found = gradients(lambda: of(leaves["A"]), leaves)
    for name, tensor in gradients(lambda: reference_options.orthogonal_loss(leaves["A"]), leaves).items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-6)


def test_its_bounds() -> None:
    """By hand: 0 for rows of an identity, 1 for experts that are all the same, whatever their sizes."""
    apart = torch.eye(6).view(3, 2, 6)
    assert of(apart).item() == 0
    same = 5 * torch.eye(2, 6).expand(3, 2, 6)
    assert of(same).item() == pytest.approx(1.0)
    half = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    assert of(half).item() == pytest.approx(0.5)
    assert of(torch.randn(1, 2, 6)).item() == 0
    assert of(torch.cat([apart, torch.zeros(1, 2, 6)])).item() == 0  # a null expert


def naive_of(model: Any, only: str = "") -> torch.Tensor:
    terms = []
    for name, layer in tuner_layers(model).items():
        if "default" in layer.moelora_router and only in name:
            roles = [stacks(layer, role)[0] for role in layer.linear_sizes()]
            terms.append(torch.stack([reference_options.orthogonal_loss(a_ERD) for a_ERD in roles]).mean())
    return torch.stack(terms).mean()


def test_of_a_model() -> None:
    model = adapted("mixlora", **WORDS)
    with record_routing(model) as recorder:
        outputs(model)
    (found,) = balance_losses(recorder.records, model.peft_config["default"].balance)
    torch.testing.assert_close(found, naive_of(model), rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="reads the experts of the model, and the records are of none"):
        loss_of(LOSS, *Layers.routed("top-2").records())


@pytest.mark.parametrize("scope", ["global", "micro_batch"])
def test_its_share_of_a_step(scope: str) -> None:
    """The gradient of A is that of the model's loss and twice that of the penalty, however the step is cut."""
    words = {**WORDS, "balance_scope": scope}
    plain = one_step("mixlora", words={"balance": []})
    expected = dict(plain.gradients[0])
    model = adapted("mixlora")
    (2 * naive_of(model)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected[name] = expected[name] + parameter.grad
    for settings in ({}, {"batch": 1, "accumulate": 4}, checkpointing_words(True)):
        run = one_step("mixlora", words=words, **settings)
        assert run.logs[0]["orthogonal_loss"] == pytest.approx(naive_of(model).item(), rel=1e-4)
        for name, grad in expected.items():
            torch.testing.assert_close(run.gradients[0][name], grad, rtol=1e-3, atol=2e-6, msg=name)


def test_beside_a_loss_of_routing_that_reentrant_checkpointing_attaches_later() -> None:
    runs = [one_step("mixlora", words=BOTH, **checkpointing_words(kind)) for kind in (None, True)]
    assert runs[0].logs[0]["balance_loss"] > 0
    for name, grad in runs[0].gradients[0].items():
        torch.testing.assert_close(runs[1].gradients[0][name], grad, rtol=1e-3, atol=2e-6, msg=name)


def test_it_needs_no_trained_router() -> None:
    run = one_step("random_router", words=WORDS)
    assert run.logs[0]["orthogonal_loss"] > 0


@pytest.mark.parametrize("preset", ["hydralora", "mov"])
def test_experts_without_an_a_each_are_refused(preset: str) -> None:
    with pytest.raises(ConfigError, match="experts have no A each; allowed"):
        MoeLoraConfig.from_preset(preset, **WORDS)
