"""Half precision, autocast, quantised bases and torch.compile: the router computes in fp32 and the losses are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig

from moelora import MoeLoraSFTTrainer
from moelora.routing.router import Router
from tests.adapters import adapted, shake, small_config
from tests.conftest import tiny_model
from tests.training.runs import Run, one_step, sft_rows, tiny_tokenizer, toy_rows, train

# A small alpha: the untrained adapters of the tests would amplify rounding errors beyond comparison, LoRA's as well.
BALANCED: dict[str, Any] = {"balance_coef": 1.0, "z_loss_coef": 0.1, "lora_alpha": 0.3}


class RouterProbe:
    """Keeps what every router was given and decided."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[Router, Tensor, Any]] = []
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(lambda m, args, out: self.seen.append((m, args[0], out)))

    def check(self) -> None:
        """Every decision is what fp32 arithmetic on the same numbers gives."""
        assert self.seen
        for router, x_TD, routing in self.seen:
            logits_TE = x_TD.detach().float() @ router.get_parameter("weight").detach().float().t()
            torch.testing.assert_close(routing.logits_TE.detach(), logits_TE, rtol=1e-5, atol=1e-5)
            assert routing.logits_TE.dtype == routing.weights_TK.dtype == routing.probs_TE.dtype == torch.float32


def assert_near(found: Run, exact: Run) -> None:
    """Losses and gradients agree as far as bf16 allows."""
    for key in ("loss", "balance_loss", "z_loss"):
        assert found.logs[0][key] == pytest.approx(exact.logs[0][key], rel=1e-2)
    for name, grad in exact.gradients[0].items():
        # CPUs without bfloat16 round sums too, to 9 %; a missing or doubled term is far above this
        assert (found.gradients[0][name].float() - grad).norm() < 0.15 * grad.norm(), name


@pytest.mark.parametrize("preset", ["mixlora", "smora", "molora"])
def test_a_bf16_autocast_step(preset: str) -> None:
    model = adapted(preset, **BALANCED)
    probe = RouterProbe(model)
    run = train(model, toy_rows(), bf16=True, batch=2, accumulate=2)
    probe.check()
    if preset != "mixlora":  # whose router reads a norm, which autocast leaves in fp32
        assert any(x_TD.dtype == torch.bfloat16 for _, x_TD, _ in probe.seen)
    assert {grad.dtype for grad in run.gradients[0].values()} == {torch.float32}
    assert_near(run, one_step(preset, words=BALANCED))


@pytest.mark.parametrize("autocast_adapter", [True, False])
@pytest.mark.parametrize("preset", ["mixlora", "molora"])
def test_a_bf16_base(preset: str, autocast_adapter: bool) -> None:
    """PEFT keeps the adapter of a half-precision base in fp32, unless it is told not to."""

    def step(**cut: Any) -> Run:
        config = small_config(preset, **BALANCED)
        model = get_peft_model(tiny_model().bfloat16(), config, autocast_adapter_dtype=autocast_adapter)
        shake(model, seed=1)  # of which no token's choice is so close that half precision turns it
        probe = RouterProbe(model)
        run = train(model, toy_rows(), **cut)
        probe.check()
        return run

    whole, parts = step(), step(batch=1, accumulate=4)
    expected_dtype = torch.float32 if autocast_adapter else torch.bfloat16
    assert {grad.dtype for grad in parts.gradients[0].values()} == {expected_dtype}
    exact = one_step(preset, words={**BALANCED, "seed": 1})
    assert_near(whole, exact)
    assert_near(parts, exact)


def quantized(path: Path) -> Any:
    tiny_model(hidden_size=96, intermediate_size=128).save_pretrained(path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=settings)


def test_sft_on_a_quantised_base(tmp_path: Path) -> None:
    """TRL casts every trainable parameter to bf16, the router's weight too; its arithmetic stays fp32."""
    pytest.importorskip("bitsandbytes")
    model = get_peft_model(quantized(tmp_path), small_config("mixlora", **BALANCED))
    probe = RouterProbe(model)
    run = train(
        model,
        sft_rows(),
        trainer_class=MoeLoraSFTTrainer,
        arguments_class=SFTConfig,
        trainer_words={"processing_class": tiny_tokenizer()},
        batch=2,
        accumulate=2,
        max_steps=3,
        learning_rate=1e-2,
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    for router, _, routing in probe.seen:
        assert router.weight.dtype == torch.bfloat16
        assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert all(0.9 < log["balance_loss"] < 4 for log in run.logs)
    assert run.logs[-1]["loss"] < run.logs[0]["loss"]
    assert all(grad.abs().max() > 0 for name, grad in run.gradients[-1].items() if "router" in name)


def test_the_bias_of_a_quantised_base_stays_fp32(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = get_peft_model(quantized(tmp_path), small_config("smora", bias_update_rate=1e-5))
    train(
        model,
        sft_rows(),
        trainer_class=MoeLoraSFTTrainer,
        arguments_class=SFTConfig,
        trainer_words={"processing_class": tiny_tokenizer()},
        max_steps=3,
        learning_rate=1e-2,
    )
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert routers
    for router in routers:
        bias_E = router.get_parameter("bias")
        assert bias_E.dtype == torch.float32
        assert set((bias_E.abs() / 1e-5).round().tolist()) <= {0.0, 1.0, 2.0, 3.0}
        assert bias_E.abs().max() > 0
