"""GraphMoE: a layer is the equation of several rounds, whose state carries what experts found from one to the next."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from moelora import MoeLoraConfig, record_routing
from moelora.errors import ConfigError
from moelora.ops import reference, reference_adapters
from tests.adapters import adapted, expert_tensors, outputs, tuner_layers
from tests.ops.compare import assert_close, gradients
from tests.routing.routers import every_token

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("rounds", [2, 4])
def test_a_layer_equals_the_reference(rounds: int) -> None:
    """Forward and the gradient of the input and of every tensor."""
    model = adapted("graphmoe", rounds=rounds)
    layer = tuner_layers(model)[NAME]
    tensors, weight_EH = expert_tensors(layer), layer.moelora_router["default"].get_parameter("weight")
    x = torch.randn(2, 4, 36).requires_grad_()
    leaves = {"x": x, **tensors, "router": weight_EH}
    state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}

    def route(h_H: Tensor) -> Tensor:
        weights_1K, ids_1K = reference.softmax_top_k((weight_EH @ h_H)[None], 2, renormalize=True)
        return torch.zeros(4).scatter(0, ids_1K[0], weights_1K[0])

    def naive() -> Tensor:
        added_TO = reference_adapters.rounds_of_experts(
            x.flatten(0, 1), tensors["A.weight"], tensors["B.weight"], state, route, rounds
        )
        return layer.base_layer(x) + 2.0 * added_TO.view(2, 4, -1)

    found, expected = gradients(lambda: layer(x), leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max()))
        assert_close(name, found[name] / scale, tensor / scale, rtol=1e-4, atol=1e-6)


def test_the_state_is_that_of_a_gru_cell() -> None:
    layer = tuner_layers(adapted("graphmoe"))[NAME]
    tensors = expert_tensors(layer)
    cell = nn.GRUCell(3, 5)
    names = {"weight_ih": "input", "weight_hh": "hidden", "bias_ih": "input_shift", "bias_hh": "hidden_shift"}
    cell.load_state_dict({theirs: tensors[f"state.{ours}"].detach() for theirs, ours in names.items()})
    seen: list[Tensor] = []
    router = layer.routers["default"]
    handle = router.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x = torch.randn(1, 6, 36)
    with torch.no_grad():
        layer(x)
        handle.remove()
        assert len(seen) == 3
        torch.testing.assert_close(seen[0], x[0] @ tensors["state.start"].t())
        for before, after in itertools.pairwise(seen):
            gates_TE = router(before, every_token(1, 6)).gates_TE()
            nodes_TER = torch.einsum("td,erd->ter", x[0], tensors["A.weight"])
            nodes_TER = nodes_TER + (before @ tensors["state.back"].t()).unsqueeze(1)
            message_TR = (gates_TE.unsqueeze(-1) * nodes_TER).sum(1)
            torch.testing.assert_close(after, cell(message_TR, before), rtol=1e-4, atol=1e-5)


def test_every_round_is_recorded() -> None:
    model = adapted("graphmoe")
    with record_routing(model) as recorder:
        outputs(model)
    layers = [record.layer for record in recorder.records]
    assert len(layers) == 3 * len(tuner_layers(model))
    assert layers[:3] == [layers[0]] * 3
    assert (recorder.records[0].routing.probs_TE - recorder.records[2].routing.probs_TE).abs().max() > 1e-4


def test_later_rounds_see_what_earlier_ones_found() -> None:
    """Without the way back from the state, and with a router that does not look, one round is like another."""
    outputs_of = []
    for rounds in (2, 3):
        model = adapted("graphmoe", rounds=rounds)
        for name, p in model.named_parameters():
            if ".moelora_router." in name or name.endswith(".back"):
                p.data.zero_()
        outputs_of.append(outputs(model))
    torch.testing.assert_close(outputs_of[0], outputs_of[1], rtol=0, atol=1e-6)
    with_state = [outputs(adapted("graphmoe", rounds=rounds)) for rounds in (2, 3)]
    assert (with_state[0] - with_state[1]).abs().max() > 1e-4


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match="rounds is 1; allowed: an integer of at least 2. One round is an ordinary"):
        MoeLoraConfig.from_preset("graphmoe", rounds=1)
    with pytest.raises(ConfigError, match="Without a router there are no rounds"):
        MoeLoraConfig(experts="lora_rounds", placement="feed_forward")
