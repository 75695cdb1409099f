"""AdaMoLE in a model: a layer is its equation, each token decides alone, and its loss reaches every tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora import balance_losses, record_routing
from moelora.ops import reference
from moelora.routing.record import RoutingRecord
from moelora.selection.learned_threshold import ThresholdRouting
from tests.adapters import adapted, expert_tensors, outputs, tuner_layers
from tests.conftest import tiny_batch
from tests.ops.compare import assert_close, gradients

LAYER = "model.layers.0.self_attn.q_proj"


def records_of(model: torch.nn.Module, **inputs: Tensor) -> list[RoutingRecord]:
    with torch.no_grad(), record_routing(model) as recorder:
        model(**inputs)
    return list(recorder.records)


def test_a_layer_equals_the_reference() -> None:
    """Forward and the gradient of the input, the experts, and every tensor of the router."""
    model = adapted("adamole")
    config, layer = model.peft_config["default"], tuner_layers(model)[LAYER]
    router, experts = layer.moelora_router["default"], expert_tensors(layer)
    x_TD = torch.randn(9, 36).requires_grad_()
    tensors = {name: router.get_parameter(name) for name in ("weight", "threshold_weight", "threshold_bias")}
    leaves = {"x": x_TD, **experts, **tensors}

    def naive() -> Tensor:
        weights_TE, _ = reference.learned_threshold(
            x_TD @ tensors["weight"].t(), (x_TD @ tensors["threshold_weight"][0]) + tensors["threshold_bias"][0], 1 / 4
        )
        passed = (weights_TE > 0).sum(-1)
        assert 1 <= passed.min() < passed.max(), "the case does not tell the experts of a token apart"
        delta_TO = reference.mixture_linear(x_TD, experts["A.weight"], experts["B.weight"], weights_TE, config.scaling)
        return layer.base_layer(x_TD) + delta_TO

    found, expected = gradients(lambda: layer(x_TD), leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-5)


def test_every_token_is_sent_to_one_expert_at_least() -> None:
    model = adapted("adamole")
    for record in records_of(model, **tiny_batch()):
        counts_T = record.routing.load_TE().sum(-1)
        assert counts_T.min() >= 1
        torch.testing.assert_close(record.routing.gates_TE().sum(-1), torch.ones(33), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_no_threshold(side: str) -> None:
    model = adapted("adamole")
    ids = tiny_batch(batch_size=1, length=7)["input_ids"]
    mates = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(9))
    alone = records_of(model, input_ids=ids)
    valid = slice(5, 12) if side == "left" else slice(0, 7)
    row, mask = torch.zeros(1, 12, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)
    row[0, valid] = ids[0]
    mask[0] = 0
    mask[0, valid] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = records_of(model, input_ids=torch.cat([row, mates]), attention_mask=mask, position_ids=positions)
    for found, expected in zip(together, alone, strict=True):
        assert isinstance(found.routing, ThresholdRouting)
        assert isinstance(expected.routing, ThresholdRouting)
        found_T1, found_TE = found.routing.threshold_T1[:12][valid], found.routing.gates_TE()[:12][valid]
        torch.testing.assert_close(found_T1, expected.routing.threshold_T1, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_TE, expected.routing.gates_TE(), rtol=1e-3, atol=1e-4)


def test_a_cache_changes_no_threshold() -> None:
    model = adapted("adamole")
    ids = tiny_batch(batch_size=2, length=11)["input_ids"].clamp_min(3)
    whole = records_of(model, input_ids=ids)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    steps = []
    for i in range(8, 11):
        with torch.no_grad(), record_routing(model) as recorder:
            cache = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
        steps.append(list(recorder.records))
    for index, record in enumerate(whole):
        expected_TE = record.routing.gates_TE().view(2, 11, 4)[:, 8:]
        found_TE = torch.stack([step[index].routing.gates_TE() for step in steps], 1)
        torch.testing.assert_close(found_TE, expected_TE, rtol=1e-3, atol=1e-4)


def test_its_loss_reaches_every_tensor_of_the_router() -> None:
    model = adapted("adamole").train()
    with record_routing(model) as recorder:
        model(**tiny_batch())
    loss, _ = balance_losses(recorder.records, model.peft_config["default"].balance)
    loss.backward()
    for layer in tuner_layers(model).values():
        for name, parameter in layer.moelora_router["default"].named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    terms = [
        reference.threshold_balance_loss(r.routing.probs_TE, r.routing.threshold_T1.squeeze(1), r.valid_T)
        for r in recorder.records
        if isinstance(r.routing, ThresholdRouting)
    ]
    assert len(terms) == 14
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_threshold", [None, 0.9], ids=str)
def test_a_token_that_no_expert_passes_for_has_the_base_alone(max_threshold: float | None) -> None:
    model = adapted("adamole", max_threshold=max_threshold)
    layer = tuner_layers(model)[LAYER]
    router = layer.moelora_router["default"]
    router.threshold_bias.data.fill_(100.0)
    router.threshold_weight.data.zero_()
    router.weight.data.mul_(0.01)
    x_TD = torch.randn(9, 36)
    is_base = torch.equal(layer(x_TD), layer.base_layer(x_TD))
    assert is_base == (max_threshold is not None)
    assert outputs(model).isfinite().all()
