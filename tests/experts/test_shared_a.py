"""HydraLoRA's experts: a mixture of LoRAs whose A are all the same, forward and gradients, and fewer parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig
from tests.adapters import (
    assert_close_gradients,
    expert_tensors,
    gradients,
    outputs,
    shake,
    task_type,
    tuner_layers,
)
from tests.conftest import tiny_batch, tiny_model

PLACEMENTS = ("linear", "feed_forward")
SELECTIONS = ("dense", "top_k", "learned_threshold")


def mixture(experts: str, name: str, **words: Any) -> Any:
    """A tiny model with an adapter that nobody has moved yet."""
    config = MoeLoraConfig(experts={"kind": experts, "num_experts": 4, "r": 3}, task_type=task_type(name), **words)
    return get_peft_model(tiny_model(name), config)


def pair(name: str = "llama", **words: Any) -> tuple[Any, Any]:
    """A mixture with a shared A, and one of ordinary LoRAs with copies of it."""
    shared, apart = mixture("lora_shared_a", name, **words), mixture("lora", name, **words)
    shake(shared)
    values = shared.state_dict()
    for key, tensor in apart.state_dict().items():
        assert tensor.dim() == values[key].dim()
        tensor.copy_(values[key].expand_as(tensor))
    # double precision, since rounding adds up over the layers
    return shared.double().eval(), apart.double().eval()


def summed_over_experts(found: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the copies as that of what they are copies of."""
    return {
        key: grad.sum(0, keepdim=True) if ".moelora_A." in key and grad.shape != like[key].shape else grad
        for key, grad in found.items()
    }


@pytest.mark.parametrize("compute", ["fast", "reference"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "phi3", "phi", "bert"])
def test_equals_loras_whose_a_are_all_the_same(name: str, placement: str, selection: str, compute: str) -> None:
    shared, apart = pair(name, placement=placement, selection=selection, compute=compute)
    base = outputs(tiny_model(name).double(), name)
    assert (outputs(shared, name) - base).abs().max() > 1e-3
    torch.testing.assert_close(outputs(shared, name), outputs(apart, name), rtol=1e-5, atol=2e-6)
    batch = tiny_batch(name)
    found = gradients(shared, batch)
    assert_close_gradients(found, summed_over_experts(gradients(apart, batch), found))
    routed_a = [key for key, grad in found.items() if ".moelora_A." in key and len(grad) == 1]
    assert routed_a
    assert all(found[key].abs().max() > 0 for key in routed_a)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_parameters(placement: str) -> None:
    """E - 1 copies of A fewer at every site with a router."""
    shared, apart = (
        mixture("lora_shared_a", "llama", placement=placement),
        mixture("lora", "llama", placement=placement),
    )
    saved = 0
    for layer in tuner_layers(apart).values():
        if "default" in layer.moelora_router:
            saved += sum(3 * 3 * size for size, _ in layer.linear_sizes().values())
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (shared, apart)]
    assert counts[1] - counts[0] == saved > 0
    assert shared.peft_config["default"].num_trainable_parameters(tiny_model()) == counts[0]


def test_the_shared_a_starts_as_one_lora_does() -> None:
    model = mixture("lora_shared_a", "llama")
    for layer in tuner_layers(model).values():
        tensors = expert_tensors(layer)
        assert tensors["A.weight"].shape == (1, 3, layer.in_features)
        assert 0.5 * layer.in_features**-0.5 < tensors["A.weight"].abs().max() <= layer.in_features**-0.5
        assert not tensors["B.weight"].any()
