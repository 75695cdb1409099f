"""Loss, balance loss and every gradient do not depend on how the step was cut, padded or checkpointed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from peft import get_peft_model

from moelora import MoeLoraTrainer, record_routing
from moelora.balance.losses import balance_losses
from moelora.balance.totals import RoutingTotals
from tests.adapters import adapted, shake, small_config
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close
from tests.training.runs import Run, assert_same_step, checkpointing_words, one_step, rows_of, toy_rows, train

TARGETS = ["q_proj", "down_proj"]
# Coefficients at which the balance losses matter to every gradient, and an alpha at which the untrained adapters of the
# tests do not amplify rounding errors.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixlora": ("mixlora", {"balance_coef": 1.0, "z_loss_coef": 0.1}),
    "mixlora-pooled": ("mixlora", {"balance_coef": 1.0, "balance_loss": "mixtral"}),
    "sira": ("sira", {"balance_coef": 1.0, "expert_dropout": 0.0, "target_modules": TARGETS}),
    # the bias moves at every forward, so by how many a step has: here too little to change anything
    "smora": ("smora", {"balance_coef": 1.0, "bias_update_rate": 1e-12, "target_modules": TARGETS}),
    "molora": ("molora", {"balance_coef": 1.0, "z_loss_coef": 0.1, "target_modules": TARGETS}),
}
for _, _words in METHODS.values():
    _words["lora_alpha"] = 0.3


@cache
def whole(method: str) -> Run:
    """The step in one piece."""
    preset, words = METHODS[method]
    return one_step(preset, words=words)


CASES = {
    "2x2": (2, 2, None),
    "1x4": (1, 4, None),
    "non-reentrant": (4, 1, False),
    "reentrant": (4, 1, True),
    "1x4-non-reentrant": (1, 4, False),
    "1x4-reentrant": (1, 4, True),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_cuts_and_checkpointing(method: str, case: str) -> None:
    preset, words = METHODS[method]
    batch, accumulate, reentrant = CASES[case]
    run = one_step(preset, words=words, batch=batch, accumulate=accumulate, **checkpointing_words(reentrant))
    assert_same_step(run, whole(method))


@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_the_gradient_of_the_sum_of_the_losses(method: str) -> None:
    """By hand: the model's loss plus the coefficients times the balance losses, differentiated once."""
    preset, words = METHODS[method]
    model = adapted(preset, **words).train()
    balance = model.peft_config["default"].balance
    with record_routing(model) as recorder:
        task = model(**tiny_batch(batch_size=4)).loss
    values = balance_losses(recorder.records, balance)
    weighted = [choice.coef * value for choice, value in zip(balance, values, strict=True)]
    (task + torch.stack(weighted).sum()).backward()
    run = whole(method)
    for choice, value in zip(balance, values, strict=True):
        if choice.is_loss:
            assert run.logs[0][choice.logged_as] == pytest.approx(value.item(), rel=1e-6)
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert expected.keys() == run.gradients[0].keys()
    for name, grad in expected.items():
        assert grad is not None
        assert_close(name, run.gradients[0][name], grad, rtol=1e-4, atol=2e-6)


def test_the_balance_losses_matter_in_the_comparison() -> None:
    """Guards the tests above: without them, every router's gradient is another one."""
    for method, (preset, words) in METHODS.items():
        without = one_step(preset, words={**words, "balance_coef": 0.0, "z_loss_coef": 0.0})
        for name, grad in whole(method).gradients[0].items():
            if "router" in name:
                assert not torch.allclose(grad, without.gradients[0][name], rtol=0.05), f"{method} {name}"


@pytest.mark.parametrize("method", ["mixlora", "sira"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_more_padding_changes_nothing(method: str, side: str, accumulate: int) -> None:
    preset, words = METHODS[method]
    batch = tiny_batch(batch_size=4)
    batch["labels"][:, 0] = -100  # nothing precedes it, until padding does
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100, "position_ids": 0}
    width = (3, 0) if side == "left" else (0, 3)
    padded = {key: torch.nn.functional.pad(value, width, value=fill[key]) for key, value in batch.items()}
    run = one_step(preset, rows_of(padded), words=words, batch=4 // accumulate, accumulate=accumulate)
    assert_same_step(run, whole(method))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_every_other_layer(reentrant: bool) -> None:
    preset, words = METHODS["mixlora"]
    settings = checkpointing_words(reentrant)
    settings["activation_checkpointing_kwargs"]["every_n_layers"] = 2
    assert_same_step(one_step(preset, words=words, batch=2, accumulate=2, **settings), whole("mixlora"))


def test_a_short_last_step() -> None:
    """Five rows by four make a step of four micro-batches and one of a single one, each balanced by itself."""
    preset, words = METHODS["mixlora"]
    rows = toy_rows(5)
    run = one_step(preset, rows, words=words, batch=1, accumulate=4, max_steps=2)
    parts = [one_step(preset, rows[:4], words=words), one_step(preset, rows[4:], words=words, batch=1)]
    assert [round(log["balance_loss"], 5) for log in run.logs] == [round(p.logs[0]["balance_loss"], 5) for p in parts]
    for gradients, part in zip(run.gradients, parts, strict=True):
        for name, grad in part.gradients[0].items():
            assert_close(name, gradients[name], grad, rtol=1e-4, atol=2e-6)


DROPOUTS: dict[str, dict[str, Any]] = {
    "mixlora": {"balance_coef": 1.0, "lora_dropout": 0.3, "lora_alpha": 0.3},
    "sira": {"balance_coef": 1.0, "expert_dropout": 0.5, "lora_alpha": 0.3},
}


@pytest.mark.parametrize("preset", DROPOUTS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_with_dropout(preset: str, accumulate: int, reentrant: bool) -> None:
    cut: dict[str, Any] = {"words": DROPOUTS[preset], "batch": 4 // accumulate, "accumulate": accumulate}
    assert_same_step(one_step(preset, **cut, **checkpointing_words(reentrant)), one_step(preset, **cut))


@pytest.mark.parametrize("preset", DROPOUTS)
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_counting_draws_what_training_draws(preset: str, reentrant: bool | None) -> None:
    """The load that was counted before the step is the load of the step, dropout included."""
    counted: list[RoutingTotals] = []
    seen: list[RoutingTotals] = []

    class Watching(MoeLoraTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            assert self._moelora_totals is not None
            assert self._moelora_micro_batch is not None
            counted.append(self._moelora_totals)
            assert self._moelora_micro_batch.counted is not None
            seen.append(self._moelora_micro_batch.counted)
            return loss

    words = checkpointing_words(reentrant)
    one_step(preset, words=DROPOUTS[preset], batch=1, accumulate=4, trainer_class=Watching, **words)
    assert len(seen) == 4
    totals = seen[0] + seen[1] + seen[2] + seen[3]
    assert counted[0].mixtures == totals.mixtures
    assert torch.equal(counted[0].counts_ME, totals.counts_ME)
    assert torch.equal(counted[0].tokens_M, totals.tokens_M)


def test_counting_leaves_the_head_alone() -> None:
    """One position a row, in memory of its own: torch would multiply each row of a slice by a copy of the head."""
    seen: list[tuple[int, bool]] = []

    class Watching(MoeLoraTrainer):
        def _count(self, *args: Any) -> RoutingTotals:
            def note(head: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                seen.append((inputs[0].shape[1], inputs[0].is_contiguous()))

            hook = self.model.get_output_embeddings().register_forward_pre_hook(note)
            try:
                return super()._count(*args)
            finally:
                hook.remove()

    preset, words = METHODS["mixlora"]
    one_step(preset, words=words, batch=2, accumulate=2, trainer_class=Watching)
    assert seen == [(1, True)] * 2


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_scope_micro_batch(reentrant: bool | None) -> None:
    """Each micro-batch is balanced alone: value and gradient are the means of theirs."""
    preset, words = METHODS["mixlora"]
    words = {**words, "balance_scope": "micro_batch"}
    settings = {"batch": 2, "accumulate": 2, **checkpointing_words(reentrant)}
    found = one_step(preset, words=words, **settings)
    task = one_step(preset, words={**words, "balance_coef": 0.0, "z_loss_coef": 0.0}, **settings)
    model = adapted(preset, **words).train()
    balance = model.peft_config["default"].balance
    values = []
    for rows in (slice(0, 2), slice(2, 4)):
        with record_routing(model) as recorder:
            model(**{key: value[rows] for key, value in tiny_batch(batch_size=4).items()})
        values.append(balance_losses(recorder.records, balance))
        weighted = [choice.coef * value for choice, value in zip(balance, values[-1], strict=True)]
        (torch.stack(weighted).sum() / 2).backward()
    assert found.logs[0]["balance_loss"] == pytest.approx(sum(v[0].item() for v in values) / 2, rel=1e-6)
    assert found.logs[0]["balance_loss"] != pytest.approx(whole("mixlora").logs[0]["balance_loss"], rel=1e-4)
    for name, p in model.named_parameters():
        if p.requires_grad:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            assert_close(name, found.gradients[0][name] - task.gradients[0][name], grad, rtol=1e-3, atol=1e-5)


OTHERS: dict[str, tuple[str, str]] = {"t5": ("sira", "t5"), "t5-blocks": ("mixlora", "t5"), "bert": ("mixlora", "bert")}
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "t5": {"dropout_rate": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


class PerBatchMean(MoeLoraTrainer):
    """For models that return the mean over their batch whatever `num_items_in_batch` says, as T5 and BERT do."""

    loss_is_scaled_for_ga = False


def other_step(name: str, **settings: Any) -> Run:
    preset, architecture = OTHERS[name]
    words: dict[str, Any] = {"balance_coef": 1.0, "z_loss_coef": 0.1, "lora_alpha": 0.3}
    if preset == "sira":
        words |= {"expert_dropout": 0.0, "target_modules": ["k", "wo"]}
    model = get_peft_model(
        tiny_model(architecture, **NO_DROPOUT[architecture]), small_config(preset, architecture, **words)
    )
    shake(model)
    batch = tiny_batch(architecture, batch_size=4)
    if architecture == "t5":
        # as many labels in every row, so that the mean of the means is the mean
        batch["labels"] = torch.randint(3, 97, (4, 8), generator=torch.Generator().manual_seed(1))
    return train(model, rows_of(batch), PerBatchMean, **settings)


@cache
def whole_other(name: str) -> Run:
    return other_step(name)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("case", ["2x2", "non-reentrant", "1x4-reentrant"])
def test_other_architectures(name: str, case: str) -> None:
    """Encoder and decoder with masks of their own; a classifier, whose loss the trainer divides by itself."""
    batch, accumulate, reentrant = CASES[case]
    run = other_step(name, batch=batch, accumulate=accumulate, **checkpointing_words(reentrant))
    assert_same_step(run, whole_other(name))
