"""MixPHM: a layer is its equation in both modes, and an expert that is not drawn is in the graph all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig, record_routing
from moelora.errors import ConfigError
from tests.adapters import adapted, expert_tensors, outputs, small_config, tuner_layers
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close, gradients

NAME = "model.layers.0.mlp.down_proj"


def kronecker(p: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.stack([torch.kron(p_i, u_i @ v_i) for p_i, u_i, v_i in zip(p, u, v, strict=True)]).sum(0)


def naive(layer: Any, x: Tensor, weights: list[float]) -> Tensor:
    """One token after the other, one expert after the other."""
    tensors = expert_tensors(layer)
    p, u, v, s = (tensors[f"{name}.down"] for name in "PUVS")
    rows = []
    for y in layer.base_layer(x).flatten(0, 1):
        z = torch.nn.functional.gelu(y @ kronecker(p, u, v) + s)
        ups = (
            z @ kronecker(tensors["P.up"][e], tensors["U.up"][e], tensors["V.up"][e]) + tensors["S.up"][e]
            for e in range(3)
        )
        rows.append(y + 0.7 * sum(weight * up for weight, up in zip(weights, ups, strict=True)))
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_equals_the_reference(training: bool) -> None:
    """Forward and the gradient of the input and of every tensor: the mean of all in evaluation, one in training."""
    layer = tuner_layers(adapted("mixphm", scale=0.7).train(training))[NAME]
    tensors = expert_tensors(layer)
    assert tensors["U.up"].shape == (3, 4, 3, 2)
    assert tensors["V.down"].shape == (4, 2, 3)
    x = torch.randn(2, 4, 52).requires_grad_()
    leaves = {"x": x, **tensors}

    def ours() -> Tensor:
        torch.manual_seed(2)
        return layer(x)

    torch.manual_seed(2)
    drawn = int(torch.randint(3, (1, 1)))
    weights = [float(e == drawn) for e in range(3)] if training else [1 / 3] * 3
    found, expected = gradients(ours, leaves), gradients(lambda: naive(layer, x, weights), leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-5)
    if training:
        others = [e for e in range(3) if e != drawn]
        assert not found["V.up"][others].any()
        assert found["V.up"][drawn].abs().max() > 0


def test_each_layer_and_each_forward_draws_all_experts_in_the_long_run() -> None:
    model = adapted("mixphm").train()
    drawn: list[tuple[int, ...]] = []
    for _ in range(30):
        with torch.no_grad(), record_routing(model) as recorder:
            model(**tiny_batch())
        for record in recorder.records:
            assert (record.load_E() == 1).sum() == 1  # one for all tokens
        drawn.append(tuple(int(record.load_E().argmax()) for record in recorder.records))
    assert {one for one, _ in drawn} == {two for _, two in drawn} == {0, 1, 2}
    assert any(one != two for one, two in drawn)
    model.eval()
    assert torch.equal(outputs(model), outputs(model))


def test_it_is_behind_the_block_of_any_form() -> None:
    for name in ("llama", "gpt2", "t5", "bert", "phi3"):
        model = get_peft_model(tiny_model(name), small_config("mixphm", name))
        ends = {path.rpartition(".")[2] for path in tuner_layers(model)}
        assert ends == {{"gpt2": "c_proj", "t5": "wo", "bert": "dense"}.get(name, "down_proj")}
        assert len(tuner_layers(model)) == (4 if name == "t5" else 2)


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match="summands is 5, and .* has 36 features"):
        get_peft_model(tiny_model(), small_config("mixphm", summands=5))
    with pytest.raises(ConfigError, match="mixed before they meet a token"):
        MoeLoraConfig(experts="phm", placement={"kind": "parts", "parts": ["down"]})
    with pytest.raises(ConfigError, match="placement is "):
        MoeLoraConfig(experts="phm", scores="constant", selection="draw")
