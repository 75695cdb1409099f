"""Every preset learns a toy task, and what is trained moves while what is frozen stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from moelora import MoeLoraConfig
from tests.adapters import PRESETS, SMALL, adapter_tensors
from tests.conftest import tiny_model
from tests.training.runs import train


def counting_rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Each row counts up from a number of its own."""
    starts = torch.arange(count) * 5 % 60 + 4
    return [{"input_ids": ids, "labels": ids} for ids in starts[:, None] + torch.arange(9)]


@pytest.mark.parametrize("preset", PRESETS)  # the others: tests/presets/test_properties.py
def test_every_preset_learns(preset: str) -> None:
    words: dict[str, Any] = {"task_type": "CAUSAL_LM", **SMALL[preset]}
    if preset == "smora":
        words["bias_update_rate"] = 1e-3
    # weights of a size at which the frozen layers have something to offer
    model = get_peft_model(tiny_model(initializer_range=0.2), MoeLoraConfig.from_preset(preset, **words))
    before = adapter_tensors(model)
    run = train(model, counting_rows(), batch=16, max_steps=20, learning_rate=2e-2)
    losses = [log["loss"] for log in run.logs]
    assert losses[-1] < 0.6 * losses[0], losses
    after = adapter_tensors(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in before.items():
        moves = name in trainable or name.endswith("router.default.bias")
        assert torch.equal(after[name], tensor) != moves, name
    assert any("router" in name for name in trainable) == (preset not in ("random_router", "lora"))


@pytest.mark.parametrize("preset", ["mixlora", "sira"])
def test_the_balance_loss_balances(preset: str) -> None:
    """A router that starts lopsided is evened out by the loss, and not without it."""
    busiest = {}
    for coef in (0.0, 1.0):
        words: dict[str, Any] = {**SMALL[preset], "top_k": 1, "balance_coef": coef, "task_type": "CAUSAL_LM"}
        if preset == "sira":
            words |= {"expert_dropout": 0.0, "target_modules": ["up_proj"]}
        model = get_peft_model(tiny_model(), MoeLoraConfig.from_preset(preset, **words))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "router" in name:
                    p.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
                    p[0] *= 6
        run = train(model, counting_rows(), batch=16, max_steps=30, learning_rate=5e-3)
        busiest[coef] = [log["expert_load/busiest"] for log in run.logs]
        if coef:
            assert run.logs[0]["balance_loss"] > 1.3
            assert run.logs[-1]["balance_loss"] - 1 < 0.5 * (run.logs[0]["balance_loss"] - 1)
    assert busiest[0.0][0] == busiest[1.0][0] > 0.45
    assert sum(busiest[1.0][-5:]) / 5 < sum(busiest[0.0][-5:]) / 5 - 0.05


def test_the_bias_balances() -> None:
    """SMoRA without a loss: the bias alone takes tokens from an expert that starts with too many."""
    config = MoeLoraConfig.from_preset("smora", r=6, top_k=2, bias_update_rate=0.002, target_modules=["up_proj"])
    model = get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("router.default.weight"):
                tensor.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
            elif name.endswith("router.default.bias"):
                tensor[0] = 0.05
    run = train(model, counting_rows(), batch=16, max_steps=20, learning_rate=0.0)
    busiest = [log["expert_load/busiest"] for log in run.logs]
    assert busiest[0] > 0.3
    assert busiest[-1] < 0.2  # 1/6 is balance
