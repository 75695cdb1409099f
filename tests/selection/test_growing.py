"""A number of chosen experts that grows in training (SMoE-Dropout), and is resumed.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from moelora import MoeLoraConfig, MoeLoraTrainer
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.selection.growing import GrowingTopK
from tests.adapters import adapted, adapter_tensors, tuner_layers
from tests.routing.routers import every_token, new_router
from tests.training.runs import toy_rows, train

WORDS: dict[str, Any] = {"top_k": 1, "selection": "growing_top_k"}


@pytest.mark.parametrize("divide", [False, True], ids=["raw", "renormalized"])
@pytest.mark.parametrize(("share", "k"), [(0.0, 2), (0.24, 3), (0.5, 4), (1.0, 6)])
def test_equals_top_k_of_so_many(share: float, k: int, divide: bool) -> None:
    router = new_router(GrowingTopK(k=2, renormalize=divide), num_experts=6)
    weight_ED = router.get_parameter("weight")
    torch.nn.init.normal_(weight_ED)
    router.set_progress(share)
    x_TD = torch.randn(9, 12)
    routing = router(x_TD, every_token(1, 9))
    weights_TK, ids_TK = reference.softmax_top_k(x_TD @ weight_ED.t(), k, divide)
    expected_TE = torch.zeros(9, 6).scatter(1, ids_TK, weights_TK)
    torch.testing.assert_close(routing.gates_TE(), expected_TE, rtol=1e-5, atol=1e-6)
    assert torch.equal(routing.load_TE().sum(-1), torch.full((9,), float(k)))
    upstream = torch.randn(9, 6)
    (grad,) = torch.autograd.grad(routing.gates_TE(), weight_ED, upstream)
    (expected,) = torch.autograd.grad(expected_TE, weight_ED, upstream)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def progress(model: Any) -> set[float]:
    layers = tuner_layers(model).values()
    routers = [layer.moelora_router["default"] for layer in layers if "default" in layer.moelora_router]
    return {round(float(router.progress), 6) for router in routers}


class Seen(TrainerCallback):
    """The progress of every step, after it."""

    def __init__(self) -> None:
        self.steps: list[set[float]] = []

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(progress(model))


def test_training_moves_it_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.01, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    seen, again = Seen(), Seen()
    straight = train(
        adapted("random_router", **WORDS), toy_rows(4), output_dir=str(tmp_path), callbacks=[seen], **settings
    )
    assert seen.steps == [{0.0}, {0.25}, {0.5}, {0.75}, {1.0}]
    fresh = adapted("random_router", seed=7, **WORDS)
    resumed = MoeLoraTrainer(model=fresh, args=straight.trainer.args, train_dataset=toy_rows(4), callbacks=[again])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.steps == seen.steps[2:]
    for name, tensor in adapter_tensors(straight.trainer.model).items():
        assert torch.equal(adapter_tensors(fresh)[name], tensor), name


def test_it_is_no_matter_of_the_dtype() -> None:
    router = new_router(GrowingTopK(k=1), num_experts=300).to(torch.bfloat16)
    router.set_progress(0.3333)
    assert router(torch.randn(2, 12), every_token(1, 2)).load_TE().sum(-1).tolist() == [101.0, 101.0]


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="top_k is 0"):
        GrowingTopK(k=0)
    with pytest.raises(ConfigError, match=r"top_k is 9; allowed: 1 to num_experts \(8\)"):
        MoeLoraConfig(selection={"kind": "growing_top_k", "k": 9})
