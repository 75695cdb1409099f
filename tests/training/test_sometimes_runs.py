"""A mixture need not run in every micro-batch, nor on every process; one that did not run has zero tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelora import record_routing
from tests.adapters import ROUTED, router_biases
from tests.llava import adapted_llava, collate, mixed_rows
from tests.training.runs import Run, assert_same_step, train

WORDS: dict[str, dict[str, Any]] = {
    "mixlora": {"balance_coef": 1.0, "z_loss_coef": 0.1},
    "mixlora_dynamic": {"balance_coef": 1.0, "balance_loss": "switch"},  # the pooled form needs one E
    "mixlora_switch": {"balance_coef": 1.0},
    "sira": {"balance_coef": 1.0, "expert_dropout": 0.0},
    # the bias moves at every forward, so by how many a step has: here too little to change anything
    "smora": {"balance_coef": 1.0, "bias_update_rate": 1e-12},
    "molora": {"balance_coef": 1.0},
    "adamole": {"balance_coef": 1.0},
    "adamole_fixed": {"balance_coef": 1.0},
    "hydralora": {"balance_coef": 1.0},
    "random_router": {},
}


def step(preset: str, pattern: str, *, batch: int, accumulate: int = 1, max_steps: int = 1, **words: Any) -> Run:
    torch.manual_seed(0)
    return train(
        adapted_llava(preset, lora_alpha=0.3, **WORDS[preset], **words),
        mixed_rows(pattern),
        batch=batch,
        accumulate=accumulate,
        max_steps=max_steps,
        remove_unused_columns=False,
        trainer_words={"data_collator": collate},
    )


@pytest.mark.parametrize("pattern", ["titi", "ttti", "ittt"])
@pytest.mark.parametrize("preset", ROUTED)
def test_a_step_does_not_depend_on_how_it_was_cut(preset: str, pattern: str) -> None:
    whole = step(preset, pattern, batch=4)
    assert_same_step(step(preset, pattern, batch=1, accumulate=4), whole)
    assert_same_step(step(preset, pattern, batch=2, accumulate=2), whole)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("preset", ["mixlora", "sira"])
def test_scope_micro_batch(preset: str, accumulate: int) -> None:
    run = step(preset, "titititi", batch=1, accumulate=accumulate, max_steps=2, balance_scope="micro_batch")
    assert all(log["balance_loss"] > 0.9 for log in run.logs)


def balance_by_hand(preset: str, pattern: str) -> float:
    """`E * sum_e f_e P_e` of each mixture that has tokens, and the mean over these."""
    model = adapted_llava(preset, lora_alpha=0.3, **WORDS[preset]).train()
    with record_routing(model) as recorder:
        model(**collate(mixed_rows(pattern)))
    terms = []
    for record in recorder.records:
        share_E = record.load_E()
        probs_E = record.routing.probs_TE[record.valid_T].mean(0)
        terms.append(record.num_experts * float((share_E * probs_E).sum()))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("pattern", ["tttt", "titi", "iiii"])
def test_the_mean_is_over_the_mixtures_that_have_tokens(pattern: str, accumulate: int) -> None:
    run = step("mixlora", pattern, batch=4 // accumulate, accumulate=accumulate)
    assert run.logs[0]["balance_loss"] == pytest.approx(balance_by_hand("mixlora", pattern), rel=1e-5)


def test_every_log_has_the_same_mixtures() -> None:
    """Also that of a step without any image."""
    run = step("mixlora", "titttiii", batch=2, max_steps=4)
    keys = [{key for key in log if key.startswith("expert_load/model")} for log in run.logs]
    assert len(keys) == 4
    assert any("vision_tower" in key for key in keys[1])
    assert keys[1:] == keys[:-1]


def test_the_bias_of_a_mixture_that_did_not_run_stays() -> None:
    model = adapted_llava("smora", bias_update_rate=0.1).train()
    before = router_biases(model)
    model(**collate(mixed_rows("tt")))
    for name, bias_E in router_biases(model).items():
        assert torch.equal(bias_E, before[name]) == ("vision_tower" in name or "projector" in name), name
