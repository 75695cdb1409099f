"""What every preset keeps, on the kind of model that it is for.

Presets of LoRA experts have tests of these in many files, on many models; here each preset of the family has all of
them on one.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from moelora import MoeLoraConfig, batch_facts, presets
from moelora.hub import read_adapter
from moelora.layers.base import MoeLoraLayer
from moelora_cli import main
from tests.adapters import (
    BY_TASK,
    FAMILY,
    adapted,
    adapter_tensors,
    assert_close_gradients,
    assert_equal_tensors,
    base_of,
    gradients,
    outputs,
    prepare,
    shake,
    small_config,
    snapshot,
    train_steps,
)
from tests.conftest import tiny_batch, tiny_model

NOT_THE_BASE_AT_FIRST: dict[str, str] = {
    "mixlora_dynamic": "the block is scaled by the sum of raw probabilities",
    "mixlora_switch": "the block is scaled by a raw probability",
    "mixda": "the block is one of the gate's choices",
}
"""Presets that do not start at the base model, with the reason."""

TRAINED_BY_THE_BALANCE: dict[str, str] = {"llava_mole": ".moelora_router."}
"""Tensors that the task gives a gradient of 0: what part of their names is."""
ROUNDED_IN_NF4: dict[str, float] = {"mixdora": 0.1}
"""What may differ in evaluation on a CPU that repacks 4-bit weights: the norms are then those of rounded weights."""

every_preset = pytest.mark.parametrize("preset", FAMILY)
every_decoder = pytest.mark.parametrize("preset", [preset for preset in FAMILY if base_of(preset) != "bert"])


@pytest.fixture(autouse=True)
def _one_task(request: pytest.FixtureRequest) -> Iterator[None]:
    """Presets that route by the task have all their sequences of one here."""
    callspec = getattr(request.node, "callspec", None)
    facts = {"task_ids": [1]} if callspec and callspec.params.get("preset") in BY_TASK else {}
    with batch_facts(**facts):
        yield


def base(preset: str, **words: Any) -> Any:
    """A tiny model that the preset fits."""
    return tiny_model(base_of(preset), **words)


def config_of(preset: str, **words: Any) -> MoeLoraConfig:
    """A small configuration; of a classifier without its head, which PEFT would train and save whole."""
    name = base_of(preset)
    return small_config(preset, name, **{**({"task_type": None} if name == "bert" else {}), **words})


def fresh(preset: str, **words: Any) -> Any:
    """A model with an adapter as it starts."""
    return prepare(get_peft_model(base(preset), config_of(preset, **words))).eval()


def shaken(preset: str, seed: int = 0, **words: Any) -> Any:
    """A model with an adapter that changes its outputs."""
    return adapted(preset, base_of(preset), seed=seed, **{"task_type": config_of(preset).task_type, **words})


def logits(model: Any, preset: str, **inputs: Any) -> Tensor:
    """Logits of the preset's tiny batch."""
    return outputs(model, base_of(preset), **inputs)


def test_the_family_is_what_there_is() -> None:
    assert set(FAMILY) == set(presets.available())


@every_preset
def test_it_starts_at_the_base_model(preset: str) -> None:
    found, expected = logits(fresh(preset), preset), logits(base(preset), preset)
    if preset in NOT_THE_BASE_AT_FIRST:
        assert (found - expected).abs().max() > 1e-5, NOT_THE_BASE_AT_FIRST[preset]
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@every_preset
def test_its_parameters_are_counted_and_all_have_gradients(preset: str) -> None:
    model = shaken(preset).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name}
    config = config_of(preset)
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert config.num_trainable_parameters(base(preset)) == whole
    found = gradients(model, *(tiny_batch(base_of(preset), seed=seed) for seed in range(6)))
    without = {name for name in trained if TRAINED_BY_THE_BALANCE.get(preset, "nothing") in name}
    assert bool(without) is (preset in TRAINED_BY_THE_BALANCE)
    assert all(name in found and bool(found[name].abs().max() > 0) is (name not in without) for name in trained)
    assert all("moelora_" in name for name in trained)


@every_preset
def test_disabling_and_unloading_give_the_base_model(preset: str) -> None:
    before = base(preset)
    view, expected = snapshot(before), logits(before, preset)
    model = prepare(get_peft_model(before, config_of(preset)))
    shake(model)
    assert (logits(model, preset) - expected).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model, preset), expected)
    unloaded = model.unload()
    after = snapshot(unloaded)
    for each in (view, after):
        each["parameters"] = {key: (value[0], value[2]) for key, value in each["parameters"].items()}
    assert after == view
    assert torch.equal(logits(unloaded, preset), expected)


@every_preset
def test_padding_and_batch_mates_change_nothing(preset: str) -> None:
    model = shaken(preset)
    ids = tiny_batch(base_of(preset), batch_size=1, length=7)["input_ids"]
    mates = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(9))
    alone = logits(model, preset, input_ids=ids, attention_mask=None, labels=None)[0]
    is_encoder = base_of(preset) == "bert"  # a BERT takes the positions of its tokens from where they stand
    for place in (slice(0, 7),) if is_encoder else (slice(0, 7), slice(5, 12)):  # padded on the right, and on the left
        row, mask = torch.zeros(1, 12, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)
        row[0, place], mask[0], mask[0, place] = ids[0], 0, 1
        words = {} if is_encoder else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        batch = {"input_ids": torch.cat([row, mates]), "attention_mask": mask, **words}
        together = logits(model, preset, **batch, labels=None)[0]
        torch.testing.assert_close(together if together.dim() == 1 else together[place], alone, rtol=1e-4, atol=3e-5)


@every_preset
def test_a_batch_that_is_made_to_crowd_experts_changes_nothing(preset: str) -> None:
    """The attack of "Buffer Overflow in Mixture of Experts" (arXiv 2402.05526): mates that fill the victim's experts.

    They stand before it in the batch: its own tokens again and again, and each of its tokens alone.
    """
    model = shaken(preset)
    victim = tiny_batch(base_of(preset), batch_size=1, length=8)["input_ids"]
    crowd = torch.cat([victim.expand(6, 8), victim.T.expand(8, 8)])
    alone = logits(model, preset, input_ids=victim, attention_mask=None, labels=None)[0]
    for batch, place in ((torch.cat([crowd, victim]), -1), (torch.cat([victim, crowd]), 0)):
        together = logits(model, preset, input_ids=batch, attention_mask=None, labels=None)[place]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=3e-5)


@every_decoder
def test_the_cache_changes_nothing(preset: str) -> None:
    model = shaken(preset)
    ids = tiny_batch(batch_size=2, length=6)["input_ids"].clamp_min(3)
    words = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=ids, use_cache=True, **words)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **words))


@every_decoder
def test_a_packed_row_gives_what_its_sequences_give(preset: str) -> None:
    model = shaken(preset)
    parts = [torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 5)]
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    with torch.no_grad():
        apart = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
        packed = model(input_ids=torch.cat(parts)[None], position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=3e-5)


@every_preset
def test_gradient_checkpointing_changes_no_gradient(preset: str) -> None:
    found = []
    for words in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model = shaken(preset).train()
        if words is not None:
            model.activation_checkpointing_enable(words)
            model.enable_input_require_grads()
        torch.manual_seed(11)
        found.append(gradients(model, tiny_batch(base_of(preset))))
    for each in found[1:]:
        assert_close_gradients(each, found[0])


@every_preset
def test_saving_loading_and_going_on(preset: str, tmp_path: Path) -> None:
    name = base_of(preset)
    model = prepare(get_peft_model(base(preset), config_of(preset)))
    torch.manual_seed(3)
    train_steps(model, name)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base(preset), str(tmp_path), is_trainable=True)
    assert_equal_tensors(adapter_tensors(loaded), adapter_tensors(model))
    assert torch.equal(logits(loaded.eval(), preset), logits(model.eval(), preset))
    for each in (model, loaded):
        torch.manual_seed(4)
        train_steps(each, name)
    assert_equal_tensors(adapter_tensors(loaded), adapter_tensors(model))
    found = MoeLoraConfig.from_pretrained(str(tmp_path))
    assert found.describe() == model.peft_config["default"].describe()
    assert found.preset == preset


@every_preset
def test_hot_swap(preset: str, tmp_path: Path) -> None:
    other = shaken(preset, seed=2)
    other.save_pretrained(str(tmp_path))
    model, expected = shaken(preset, seed=1), logits(other, preset)
    assert not torch.equal(logits(model, preset), expected)
    hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert_equal_tensors(adapter_tensors(model), adapter_tensors(other))
    # tensors that are views of a file need not be aligned, and a matrix product then sums in another order
    torch.testing.assert_close(logits(model, preset), expected, rtol=0, atol=1e-6)


@every_preset
def test_a_second_adapter(preset: str) -> None:
    """Each alone is what it is without the other, both add up their changes, and a row may choose its own."""
    name = base_of(preset)
    model = shaken(preset)
    alone = logits(model, preset)
    model.add_adapter("second", config_of(preset))
    prepare(model, "second").set_adapter("second")
    shake(model, seed=5)
    model.eval()
    second = logits(model, preset)
    model.set_adapter("default")
    first = logits(model, preset)
    assert (first - second).abs().max() > 1e-4
    assert not torch.equal(first, alone)  # it was shaken once more
    model.base_model.set_adapter(["default", "second"])
    assert logits(model, preset).isfinite().all()
    model.set_adapter("default")
    batch = {key: value for key, value in tiny_batch(name).items() if key != "labels"}
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["second", "default", "second"]).logits
    rows = torch.stack([second[0], first[1], second[2]])
    valid = batch["attention_mask"].bool() if rows.dim() == 3 else slice(None)
    torch.testing.assert_close(mixed[valid], rows[valid], rtol=1e-4, atol=3e-5)
    model.delete_adapter("second")
    assert torch.equal(logits(model, preset), first)


@every_preset
def test_copies_and_inference_mode(preset: str) -> None:
    model = shaken(preset)
    other = copy.deepcopy(model)
    expected = logits(model, preset)
    assert torch.equal(logits(other, preset), expected)
    shake(other, seed=5)
    assert not torch.equal(logits(other, preset), expected)
    assert torch.equal(logits(model, preset), expected)
    wanted = gradients(shaken(preset), tiny_batch(base_of(preset)))
    with torch.inference_mode():
        torch.testing.assert_close(model(**tiny_batch(base_of(preset))).logits, expected, rtol=0, atol=1e-6)
    assert_close_gradients(gradients(model, tiny_batch(base_of(preset))), wanted)


@every_preset
def test_training_lowers_the_loss(preset: str) -> None:
    config = config_of(preset)
    losses, model = learn(prepare(get_peft_model(base(preset, initializer_range=0.2), config)))
    assert losses[-1] < losses[0] - 0.3 * min(1.0, losses[0]), losses
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("preset", [preset for preset in FAMILY if base_of(preset) == "llama"])
def test_training_lowers_the_loss_of_an_encoder(preset: str) -> None:
    calm: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_model("bert", initializer_range=0.2, **calm)
    config = small_config(preset, "bert", task_type=None, exclude_modules=["pooler.dense", "classifier"])
    losses, _ = learn(prepare(get_peft_model(model, config)), steps=4, rate=1e-2)
    assert min(losses) < losses[0] - 0.1, losses  # a step may draw an expert that has not learnt yet


def learn(model: Any, steps: int = 12, rate: float = 3e-2) -> tuple[list[float], Any]:
    name = "bert" if model.config.model_type == "bert" else "llama"
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**tiny_batch(name)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < losses[0] - 0.3 * min(1.0, losses[0]):
            break  # all that the tests ask for
    return losses, model


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The tiny model of a preset in nf4; blocks of 64 weights want round sizes."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("bases")

    def load(preset: str) -> Any:
        name = base_of(preset)
        if not (folder / name).exists():
            sizes = {**SIZES, **({"num_labels": 64} if name == "bert" else {"num_key_value_heads": 2, "head_dim": 16})}
            tiny_model(name, initializer_range=0.2, **sizes).save_pretrained(folder / name)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        auto: Any = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
        return auto.from_pretrained(folder / name, quantization_config=nf4, dtype=torch.float32).eval()

    return load


@every_preset
def test_nf4(preset: str, quantised: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    # before any evaluation, which repacks 4-bit weights on CPUs with AVX512-BF16 for good
    losses, model = learn(prepare(get_peft_model(quantised(preset), config_of(preset))), steps=6)
    assert losses[-1] < losses[0] - 0.1 * min(1.0, losses[0]), losses
    model = prepare(get_peft_model(loaded := quantised(preset), config_of(preset))).eval()
    with model.disable_adapter():
        expected = logits(loaded, preset)
    if preset not in NOT_THE_BASE_AT_FIRST:
        torch.testing.assert_close(logits(model, preset), expected, atol=ROUNDED_IN_NF4.get(preset, 2e-2), rtol=2e-2)


@every_preset
def test_inspect(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shaken(preset)
    model.save_pretrained(str(tmp_path))
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert read_adapter(tmp_path).missing() == []
    assert f"preset      {preset}" in printed
    tensors = adapter_tensors(model)
    stored = sum(tensor.numel() for tensor in tensors.values())
    trained = sum(p.numel() for name, p in model.named_parameters() if name in tensors and p.requires_grad)
    assert f"{stored:,} stored, {trained:,} trainable" in printed
    for layer in model.modules():
        if isinstance(layer, MoeLoraLayer):
            assert layer.name.rpartition(".")[2] in printed
