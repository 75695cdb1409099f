"""The tensors of LoRA experts, and their scaling."""

from __future__ import annotations

import pytest
import torch

from moelora.choices import Site
from moelora.experts.lora import LoraExperts
from moelora.tensors import AdapterTensors

BLOCK = Site(
    name="mlp",
    linears={"up": (12, 20), "down": (20, 12)},
    num_experts=5,
    routed=True,
    router_features=12,
)


def test_a_pair_for_each_linear_of_a_block() -> None:
    params = LoraExperts(num_experts=5, r=3).params(BLOCK)
    assert {param.name: param.shape for param in params} == {
        "A.up": (5, 3, 12),
        "B.up": (5, 20, 3),
        "A.down": (5, 3, 20),
        "B.down": (5, 12, 3),
    }
    assert all(param.trainable for param in params)
    assert [param.init.kind for param in params] == ["kaiming", "zeros"] * 2


def test_the_number_of_experts_is_that_of_the_site() -> None:
    """A linear without a router has one, whatever the mixtures have."""
    alone = Site(name="q_proj", linears={"": (12, 20)}, num_experts=1, routed=False, router_features=12)
    params = LoraExperts(num_experts=5, r=3).params(alone)
    assert {param.name: param.shape for param in params} == {"A.weight": (1, 3, 12), "B.weight": (1, 20, 3)}


def test_normal_initialisation() -> None:
    a, _ = LoraExperts(r=64, init="normal", init_std=0.3).params(
        Site(name="q_proj", linears={"": (200, 20)}, num_experts=4, routed=True, router_features=200)
    )
    tensor = torch.full(a.shape, float("nan"))
    a.init.fill(tensor)
    assert abs(float(tensor.std()) - 0.3) < 0.01


def test_factors_are_those_of_the_linear() -> None:
    experts = LoraExperts(num_experts=5, r=3, lora_alpha=6)
    params = experts.params(BLOCK)
    parts = {first: AdapterTensors(p for p in params if p.name.startswith(first)) for first in ("A", "B")}
    factors = experts.factors(parts, "up", experts.scaling)
    assert factors is not None
    assert factors.a_ERD is parts["A"].up
    assert factors.b_EOR is parts["B"].up
    assert factors.scaling == 2.0
    assert experts.factors(parts, "gate", 1.0) is None
    assert experts.factors(parts, "", 1.0) is None


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 32 / 16), (True, 32 / 4)])
def test_scaling(rslora: bool, scaling: float) -> None:
    assert LoraExperts(r=16, lora_alpha=32, use_rslora=rslora).scaling == scaling
