from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

from eval.scoring.routing import has_routers
from moelora.runs.parameters import count_parameters, is_equal_size, router_weights
from tests.adapters import adapted, small_config, tuner_layers
from tests.conftest import tiny_model


def skeleton() -> Any:
    return tiny_model().to("meta")


def test_a_token_passes_through_the_chosen_experts_and_every_router() -> None:
    # 2 layers: 4 experts of rank 3 on gate, up (36 -> 52) and down (52 -> 36); LoRA of rank 3 on q, o (36 -> 36) and
    # k, v (36 -> 18)
    experts, router, attention = 2 * 3 * 3 * 88, 2 * 4 * 36, 2 * 3 * (2 * 72 + 2 * 54)
    found = count_parameters(skeleton(), small_config("mixlora"))
    assert found.trainable == 4 * experts + router + attention
    assert found.active == 2 * experts + router + attention
    assert found.base == sum(parameter.numel() for parameter in tiny_model().parameters())


def test_a_frozen_router_is_active_and_not_trainable() -> None:
    trained = count_parameters(skeleton(), small_config("mixlora"))
    frozen = count_parameters(skeleton(), small_config("random_router"))
    assert frozen.active == trained.active
    assert frozen.trainable == trained.trainable - 2 * 4 * 36


def test_a_lora_is_active_whole() -> None:
    found = count_parameters(skeleton(), LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert found.trainable == found.active == 2 * 5 * (2 * 72 + 2 * 54 + 3 * 88)


@pytest.mark.parametrize("preset", ["mixlora", "random_router", "sira", "smora", "molora", "lora"])
def test_what_has_routers(preset: str) -> None:
    assert has_routers(adapted(preset)) == (preset != "lora")


@pytest.mark.parametrize("preset", ["mixlora", "random_router", "smora", "lora"])
def test_router_weights_are_found(preset: str) -> None:
    """Trained ones and frozen ones; the bias of SMoRA's routers is none."""
    model = adapted(preset)
    routed = [name for name, layer in tuner_layers(model).items() if "default" in layer.moelora_router]
    found = dict(router_weights(model))
    assert list(found) == [f"base_model.model.{name}.moelora_router.default.weight" for name in routed]
    assert all(weight.requires_grad == (preset != "random_router") for weight in found.values())
    assert bool(found) == (preset != "lora")


def test_equal_sizes_are_within_two_percent() -> None:
    assert is_equal_size(98, 100)
    assert is_equal_size(102, 100)
    assert not is_equal_size(97, 100)
