"""What every option on an axis keeps, in a model: as the presets in `test_properties.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from moelora import MoeLoraConfig
from tests.adapters import (
    adapted,
    adapter_tensors,
    assert_close_gradients,
    assert_equal_tensors,
    gradients,
    outputs,
    small_config,
    train_steps,
)
from tests.conftest import tiny_batch, tiny_model
from tests.presets.options import NOT_THE_BASE_AT_FIRST, OPTIONS

every_option = pytest.mark.parametrize("option", OPTIONS)


def shaken(option: str, **words: Any) -> Any:
    """A model with an adapter that changes its outputs."""
    preset, axes = OPTIONS[option]
    return adapted(preset, **{**axes, **words})


def fresh(option: str) -> Any:
    preset, axes = OPTIONS[option]
    return get_peft_model(tiny_model(), small_config(preset, **axes)).eval()


@every_option
def test_it_starts_at_the_base_model(option: str) -> None:
    close = torch.allclose(outputs(fresh(option)), outputs(tiny_model()), rtol=1e-5, atol=2e-6)
    assert close == (option not in NOT_THE_BASE_AT_FIRST)


@every_option
def test_its_parameters_are_counted_and_all_have_gradients(option: str) -> None:
    model = shaken(option).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = model.peft_config["default"]
    assert config.num_trainable_parameters(tiny_model()) == sum(p.numel() for p in trained.values())
    found = gradients(model, *(tiny_batch(seed=seed) for seed in range(6)))
    assert {name for name in trained if name not in found or not found[name].any()} == set()


@every_option
def test_padding_and_batch_mates_change_nothing(option: str) -> None:
    model = shaken(option)
    ids = tiny_batch(batch_size=1, length=7)["input_ids"]
    mates = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(9))
    alone = outputs(model, input_ids=ids, attention_mask=None, labels=None)[0]
    for place in (slice(0, 7), slice(5, 12)):  # padded on the right, and on the left
        row, mask = torch.zeros(1, 12, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)
        row[0, place], mask[0], mask[0, place] = ids[0], 0, 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        words: dict[str, Any] = {"input_ids": torch.cat([row, mates]), "attention_mask": mask}
        together = outputs(model, **words, position_ids=positions, labels=None)
        torch.testing.assert_close(together[0, place], alone, rtol=1e-4, atol=2e-5)


@every_option
def test_the_cache_changes_nothing(option: str) -> None:
    model = shaken(option)
    ids = tiny_batch(batch_size=2, length=6)["input_ids"].clamp_min(3)
    words = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=ids, use_cache=True, **words)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **words))


@every_option
def test_gradient_checkpointing_changes_no_gradient(option: str) -> None:
    found = []
    for words in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model = shaken(option).train()
        if words is not None:
            model.activation_checkpointing_enable(words)
            model.enable_input_require_grads()
        torch.manual_seed(11)
        found.append(gradients(model, tiny_batch()))
    for each in found[1:]:
        assert_close_gradients(each, found[0])


@every_option
def test_saving_loading_and_going_on(option: str, tmp_path: Path) -> None:
    model = fresh(option)
    torch.manual_seed(3)
    train_steps(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path), is_trainable=True)
    assert_equal_tensors(adapter_tensors(loaded), adapter_tensors(model))
    assert torch.equal(outputs(loaded.eval()), outputs(model))
    for each in (model, loaded):
        torch.manual_seed(4)
        train_steps(each)
    assert_equal_tensors(adapter_tensors(loaded), adapter_tensors(model))
    config = model.peft_config["default"]
    found = MoeLoraConfig.from_pretrained(str(tmp_path))
    assert found.describe() == config.describe()
    assert found.preset == OPTIONS[option][0]


@every_option
def test_it_is_another_model_than_the_preset(option: str) -> None:
    """Else the option would do nothing."""
    preset, _ = OPTIONS[option]
    plain = adapted(preset)
    model = shaken(option)
    same = {name: p.shape for name, p in plain.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    if not same:
        return
    batch = tiny_batch()
    changed = False
    for training in (False, True):
        torch.manual_seed(5)
        expected = plain.train(training)(**batch)
        torch.manual_seed(5)
        found = model.train(training)(**batch)
        changed |= not torch.allclose(found.logits, expected.logits, rtol=0, atol=1e-6)
    if not changed:  # then a gradient
        torch.manual_seed(5)
        expected_gradients = gradients(plain, batch)
        torch.manual_seed(5)
        found_gradients = gradients(model, batch)
        changed = any((found_gradients[name] - g).abs().max() > 1e-6 for name, g in expected_gradients.items())
    assert changed
