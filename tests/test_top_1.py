"""One expert a token: renormalised, its weight is always 1 and the router learns nothing of the task.

That a mixture of one expert is PEFT's LoRA is tested in `test_peft_exactness.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora import MoeLoraConfig, record_routing
from moelora.errors import ConfigError
from tests.adapters import adapted, gradients, outputs
from tests.conftest import tiny_batch


def router_gradients(model: Any, name: str = "llama") -> list[Tensor]:
    found = [grad for key, grad in gradients(model, tiny_batch(name)).items() if "moelora_router" in key]
    assert found
    return found


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("preset", ["mixlora", "sira"])
def test_the_router_learns_of_the_task(preset: str, name: str) -> None:
    words: dict[str, Any] = {"expert_dropout": 0.0} if preset == "sira" else {}
    model = adapted(preset, name, top_k=1, balance_coef=0.0, **words).train()
    assert all(grad.abs().max() > 1e-6 for grad in router_gradients(model, name))


@pytest.mark.parametrize("preset", ["mixlora", "sira"])
def test_the_weight_is_the_probability_itself(preset: str) -> None:
    """Switch (arXiv 2101.03961): `y = p_i(x) E_i(x)` with i the argmax."""
    model = adapted(preset, top_k=1)
    with record_routing(model) as recorder:
        outputs(model)
    assert recorder.records
    for record in recorder.records:
        valid_T = record.valid_T  # the scores of padding tie
        probs_T, ids_T = record.routing.probs_TE[valid_T].max(-1)
        assert torch.equal(record.routing.weights_TK[valid_T, 0], probs_T)
        assert record.routing.ids_TK is not None
        assert torch.equal(record.routing.ids_TK[valid_T, 0], ids_T)
        assert probs_T.min() < 0.9


def test_two_experts_a_token_are_renormalised_as_before() -> None:
    model = adapted("mixlora", top_k=2)
    with record_routing(model) as recorder:
        outputs(model)
    for record in recorder.records:
        sums_T = record.routing.weights_TK.sum(-1)
        torch.testing.assert_close(sums_T, torch.ones_like(sums_T))


def test_renormalising_one_expert_is_refused_for_a_trained_router() -> None:
    with pytest.raises(ConfigError, match=r"renormalize.*(top_k|k)\b"):
        MoeLoraConfig.from_preset("sira", top_k=1, renormalize=True)


def test_smora_with_one_rank_of_several_is_refused_or_learns() -> None:
    """Its weights are renormalised always, so with top_k=1 they are 1."""
    try:
        model = adapted("smora", top_k=1, bias_update_rate=0.0).train()
    except ConfigError as error:
        assert "top_k" in str(error)  # noqa: PT017
        return
    assert all(grad.abs().max() > 1e-6 for grad in router_gradients(model))


def test_a_frozen_router_may_choose_one() -> None:
    model = adapted("random_router", top_k=1)
    assert not [name for name, p in model.named_parameters() if "moelora_router" in name and p.requires_grad]
    assert torch.isfinite(outputs(model)).all()


def test_batches_without_any_choice_dropped_have_one_choice_each() -> None:
    model = adapted("mixlora", top_k=1)
    with record_routing(model) as recorder:
        outputs(model)
    valid = int(tiny_batch()["attention_mask"].sum())
    assert all(int(record.counts_E().sum()) == valid for record in recorder.records)
