"""The speed benchmark: what it measures, that its peers are the same computation, and its report."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.receipt import make_receipt
from eval.speed import measure, models, profile, report
from eval.speed import run as speed
from eval.speed.measure import Decode, LmEval, batch, forward, interleaved, spread, step
from tests.conftest import tiny_model
from tests.runs.tiny import tiny_tokenizer


def tiny(method: str) -> Any:
    base = tiny_model().requires_grad_(False)
    return models.lora(base) if method == "lora" else models.moelora(base, "mixlora")


def small_batch(tokens: int = 32) -> dict[str, torch.Tensor]:
    return {key: ids % 50 for key, ids in batch(tokens, 8).items()}


def test_methods_take_turns_and_warm_calls_do_not_count() -> None:
    calls: list[tuple[str, bool]] = []

    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def train(self, mode: bool) -> None:
            calls.append((self.name, mode))

    seconds = interleaved({"a": Model("a"), "b": Model("b")}, lambda model: None, rounds=4, train=True)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4}
    assert len(calls) == 2 * 5
    assert calls[:4] == [("a", True), ("b", True), ("a", True), ("b", True)]


def test_spread() -> None:
    seconds = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert spread(seconds) == {"median": 3.0, "q1": 1.5, "q3": 4.5, "n": 5, "seconds": seconds}
    assert spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 1, "seconds": [2.0]}


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_a_step_leaves_no_gradients_and_reaches_every_adapter_weight(method: str) -> None:
    model = tiny(method).train()
    reached: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: reached.add(name))
    step(small_batch())(model)
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_has_the_balance_losses_of_the_trainer() -> None:
    grads: list[torch.Tensor] = []
    for coef in (0.0, 0.0, 1e-2):
        torch.manual_seed(0)
        model = models.moelora(tiny_model().requires_grad_(False), "mixlora", balance_coef=coef).train()
        router = next(parameter for name, parameter in model.named_parameters() if "router" in name)
        router.register_hook(lambda grad: grads.append(grad.clone()))
        step(small_batch())(model)
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])


def test_decoding_goes_on_with_the_cache() -> None:
    model, work = tiny("mixlora").eval(), Decode(small_batch()["input_ids"])
    lengths: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    for _ in range(3):
        work(model)
    assert lengths == [8, 1, 1]


def test_copies_share_the_frozen_weights() -> None:
    base = tiny_model().requires_grad_(False)
    first, second = models.lora(base), models.moelora(base, "mixlora")
    frozen = {parameter.data_ptr() for parameter in base.parameters()}
    for model in (first, second):
        assert frozen == {p.data_ptr() for p in model.parameters() if not p.requires_grad} & frozen
    forward(small_batch())(first)


def test_equal_rank_has_the_parameters_of_the_mixture() -> None:
    base = tiny_model().requires_grad_(False)
    adapters = models.moelora(base, "mixlora"), models.lora(base, models.equal_rank(base))
    wanted, found = (adapter.get_nb_trainable_parameters()[0] for adapter in adapters)
    assert abs(found - wanted) / wanted < 0.05


def test_the_authors_package_is_equal_and_trains() -> None:
    pytest.importorskip("mixlora")
    base = tiny_model().requires_grad_(False)
    ids = small_batch()["input_ids"]
    ours, theirs = models.moelora(base, "mixlora"), models.pypi_mixlora(base)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids).logits, theirs.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    theirs.train()(**small_batch()).loss.backward()
    experts = [p for n, p in theirs.named_parameters() if "speed_experts" in n and p.requires_grad]
    assert len(experts) == 2 * 3 * 8 * len(theirs.model.layers)
    assert any(p.grad is not None for p in experts)
    assert all(layer.mlp.speed_gate.grad is not None for layer in theirs.model.layers)


def test_nothing_is_timed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_base", lambda *args, **kwargs: None)
    monkeypatch.setattr(models, "parity_error", lambda base: float("nan"))
    with pytest.raises(SystemExit, match="differ by nan of the adapter's effect; allowed: 0.001. No timing"):
        speed.check_parity(speed.Run(1, [], {}), models.SLICE)


def test_report(tmp_path: Path) -> None:
    def row(method: str, seconds: list[float], metric: str = "step") -> dict[str, Any]:
        return {"model": models.SLICE, "dtype": "bf16", "metric": metric, "method": method, **spread(seconds)}

    rows = [
        row(models.LORA, [1.0, 2.0, 4.0]),
        row("MixLoRA", [1.3, 2.2, 4.0]),
        row("MixLoRA, compiled", [2.4] * 3),
    ]
    rows += [row(models.LORA, [0.1], "tokens=256"), row("MixLoRA", [0.2], "tokens=256")]
    rows += [row("import peft", [2.0], "import"), row("import moelora", [2.4], "import")]
    for metric, seconds in (("first step", 3.0), ("steps after it", 2.0)):
        rows += [row(models.LORA, [seconds], metric), row("MixLoRA", [seconds / 2], metric)]
    receipt = make_receipt(config={"allocator": "pages=huge"}, seeds={}, seconds=60, command="python -m eval.speed")
    said = report.write_report({"receipt": receipt, "rows": rows, "parity": {"Llama slice": 1e-6}}, tmp_path)
    assert "| MixLoRA / PEFT LoRA r=16 | Llama slice, bf16 | step | 1.10 | 1.00 to 1.30 | 1.05 | **no** |" in said
    assert (
        "| MixLoRA, compiled / PEFT LoRA r=16 | Llama slice, bf16 | step | 1.20 | 0.60 to 2.40 | 1.12 | **no** |"
        in said
    )
    text = (tmp_path / "speed.md").read_text()
    assert "tokens=256" not in text
    assert "`import moelora` takes 2.40 s in a new process, `import peft` 2.00 s" in text
    assert "first step takes 1.50 times one of the steps after it, LoRA's 1.50 times" in text
    assert "pages=huge in the environment" in text
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_profile_gives_the_bound_that_matrix_products_set() -> None:
    columns = {"lora": {"matrix products": 60.0, "rest": 40.0}, "ours": {"matrix products": 70.0, "rest": 80.0}}
    table = profile.table(columns)
    assert "| ratio | 1.00 | 1.50 |" in table
    assert "| ratio, were only its products slower | 1.00 | 1.10 |" in table


def test_profiled_operations_have_a_kind() -> None:
    assert profile.kind_of("aten::addmm") == "matrix products"
    assert profile.kind_of("aten::_softmax") == "choice of experts"
    assert profile.kind_of("autograd::engine") == profile.REST


def test_timings_start_again_in_huge_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick"])
    monkeypatch.setattr(os, "execve", lambda *words: started.append(words))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    measure.restart_in_huge_pages("eval.speed", ["--quick"])
    assert not started
    measure.restart_in_huge_pages("eval.speed", None)
    [(_, command, environment)] = started
    assert command[1:] == ["-m", "eval.speed", "--quick"]
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    measure.restart_in_huge_pages("eval.speed", None)
    assert len(started) == 1


def test_lm_eval_scores_the_model_that_is_timed() -> None:
    work, model = LmEval(tiny_tokenizer(), size=50), tiny("mixlora").eval()
    lengths: list[torch.Size] = []
    model.register_forward_hook(lambda module, args, output: lengths.append(output.logits.shape[:2]))
    work(model)
    assert sum(rows for rows, _ in lengths) == 16
