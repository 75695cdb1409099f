"""Optimizers and trainers that find parts of an adapter by name or by type find all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from trl.trainer.utils import disable_dropout_in_model

from tests.adapters import PRESETS, adapted, shake, small_config
from tests.conftest import tiny_batch, tiny_model

MODELS = ("llama", "phi3", "bert", "t5")


def factors(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the trained A and B of a fresh adapter: B is what starts at 0, and A the rest that is no router."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "moelora_" in name}
    b = {name for name, p in trained.items() if not p.any()}
    a = {name for name in trained if name not in b and "moelora_router" not in name}
    assert len(a) == len(b) > 0
    return a, b


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_lora_plus_gives_every_b_the_fast_rate(preset: str, name: str) -> None:
    model = get_peft_model(tiny_model(name), small_config(preset, name, task_type=None))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    names = {id(p): key for key, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    fast = factors(model)[1]
    assert {key for key, rate in rates.items() if rate == pytest.approx(16e-4)} == fast
    assert {rate for key, rate in rates.items() if key not in fast} == {1e-4}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_lora_fa_freezes_every_a_and_nothing_else(preset: str, name: str) -> None:
    model = get_peft_model(tiny_model(name), small_config(preset, name, task_type=None))
    a, _ = factors(model)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    create_lorafa_optimizer(model, r=3, lora_alpha=8, lr=1e-3)
    assert trained - {key for key, p in model.named_parameters() if p.requires_grad} == a


DROPPING: dict[str, dict[str, Any]] = {
    preset: {"lora_dropout": 0.5, **({"expert_dropout": 0.5} if preset == "sira" else {})} for preset in PRESETS
}


@pytest.mark.parametrize("preset", PRESETS)
def test_dropout_can_be_switched_off(preset: str) -> None:
    """TRL does so before it compares a policy with its reference."""
    words: dict[str, Any] = DROPPING[preset] | ({"bias_update_rate": 0.0} if preset == "smora" else {})
    model = adapted(preset, **words).train()
    batch = tiny_batch()
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, model(**batch).logits)
        disable_dropout_in_model(model)
        assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_without_dropout_training_mode_is_evaluation_mode() -> None:
    """Of a mixture without a capacity: a dropped score is neither set to 0 nor scaled up."""
    model = adapted("sira", expert_dropout=0.5, lora_dropout=0.5, capacity_factor=None)
    batch = tiny_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        model.train()
        disable_dropout_in_model(model)
        assert torch.equal(model(**batch).logits, expected)


def test_dropout_switched_off_is_not_saved(tmp_path: Any) -> None:
    """The configuration keeps what was asked for."""
    from moelora import MoeLoraConfig

    model = adapted("sira", expert_dropout=0.5, lora_dropout=0.25)
    disable_dropout_in_model(model)
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(tiny_model(), MoeLoraConfig.from_pretrained(str(tmp_path)))
    shake(fresh)
    fresh.train()
    with torch.no_grad():
        assert not torch.equal(fresh(**tiny_batch()).logits, fresh(**tiny_batch()).logits)
