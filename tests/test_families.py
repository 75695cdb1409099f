"""What an adapter keeps on every family of models: PEFT's own list of behaviours.

tests/presets/test_properties.py has the same of every preset on the model that it is for; here it is every family, with
a mixture on whole feed-forward blocks and one on each linear. A family's model is made once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, ViTConfig, ViTForImageClassification

from moelora.errors import MergeError
from moelora.layers.split_feed_forward import MixtureSplitFeedForward
from tests.adapters import (
    adapter_tensors,
    assert_close_gradients,
    assert_equal_tensors,
    gradients,
    shake,
    small_config,
    task_type,
    tuner_layers,
)
from tests.conftest import VOCAB, tiny_batch, tiny_model
from tests.llava import collate, mixed_rows, tiny_llava

FAMILIES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi", "phi3", "gpt2", "opt", "t5", "bert", "vit"),
    *("llava", "olmoe"),
)
# beside the experts of a base that is a mixture itself, and on its attention
OF_OLMOE: dict[str, dict[str, Any]] = {"perft_e": {}, "sira": {"target_modules": r".*self_attn\.[qkvo]_proj"}}
CASES = [(family, preset) for family in FAMILIES for preset in (OF_OLMOE if family == "olmoe" else ("mixlora", "sira"))]
CAUSAL = [case for case in CASES if case[0] not in ("t5", "bert", "vit")]
SIZES = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 6}


def make(family: str) -> Any:
    """The tiny model of a family; T5's unscaled attention would make a random one chaotic."""
    if family == "llava":
        return tiny_llava()
    if family == "t5":
        return tiny_model("t5", dropout_rate=0.0, initializer_factor=0.3)
    if family not in ("opt", "vit"):
        return tiny_model(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "vit":
            sizes = {**SIZES, "intermediate_size": 52, "image_size": 8, "patch_size": 4}
            return ViTForImageClassification(ViTConfig(**sizes, num_labels=3)).eval()
        tokens = {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
        return OPTForCausalLM(OPTConfig(**SIZES, **tokens, eos_token_id=2, ffn_dim=52, word_embed_proj_dim=36)).eval()


def inputs(family: str, seed: int = 0) -> dict[str, Tensor]:
    """Three rows with labels."""
    if family == "vit":
        pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        return {"pixel_values": pixels, "labels": torch.arange(3)}
    return collate(mixed_rows("iii", seed)) if family == "llava" else tiny_batch(family, seed=seed)


@dataclass(frozen=True)
class Case:
    """A model with two adapters, of which "first" is active; a test leaves it as it was.

    Args:
        family, preset: What it is.
        base: The model without an adapter.
        expected: Its logits.
        start: Those with an adapter whose B is 0.
        model: The model with adapters that change its outputs.
    """

    family: str
    preset: str
    base: Any
    expected: Tensor
    start: Tensor
    model: Any

    def logits(self, model: Any = None, **words: Any) -> Tensor:
        """Of the family's rows."""
        with torch.no_grad():
            found: Tensor = (model or self.model)(**{**inputs(self.family), **words}).logits
        return found

    def config(self, **words: Any) -> Any:
        """A small configuration; of a classifier without its head, which PEFT would train and save whole."""
        kind = None if self.family in ("vit", "bert") else task_type(self.family)
        words = {**(OF_OLMOE[self.preset] if self.family == "olmoe" else {}), **words}
        return small_config(self.preset, task_type=kind, **words)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    transformers.set_seed(0)
    family, preset = request.param
    base = make(family)
    empty = Case(family, preset, base, torch.empty(0), torch.empty(0), None)
    expected = empty.logits(base)
    model = get_peft_model(copy.deepcopy(base), empty.config(), adapter_name="first").eval()
    start = empty.logits(model)
    model.add_adapter("second", empty.config(**({"num_experts": 3} if preset != "perft_e" else {})))
    shake(model)
    return Case(family, preset, base, expected, start, model.eval())


every_case = pytest.mark.parametrize("case", CASES, indirect=True, ids="-".join)


@every_case
def test_base_keys_status_and_merging(case: Case) -> None:
    model, first = case.model, case.logits()
    torch.testing.assert_close(case.start, case.expected, rtol=1e-5, atol=2e-6)
    assert (first - case.expected).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(case.logits(), case.expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(case.logits(), case.expected)
    assert not any(p.requires_grad for p in model.parameters())
    model.base_model.enable_adapter_layers()
    assert torch.equal(case.logits(), first)
    keys = get_peft_model_state_dict(model, adapter_name="first")
    assert keys
    assert all("moelora_" in key and "first" not in key and "base_layer" not in key for key in keys)
    status = model.get_model_status()
    assert (status.active_adapters, status.available_adapters) == (["first"], ["first", "second"])
    assert {layer.name for layer in model.get_layer_status()} == {f"model.{name}" for name in tuner_layers(model)}
    assert status.trainable_params == case.config().num_trainable_parameters(case.base)
    for way in (model.merge_and_unload, model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(MergeError, match="cannot be merged into the base weights"):
            way()
    assert torch.equal(case.logits(), first)
    assert torch.equal(case.logits(copy.deepcopy(model).unload()), case.expected)


@every_case
def test_saving_loading_and_hot_swap(case: Case, tmp_path: Path) -> None:
    model, first = case.model, case.logits()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(case.base), str(tmp_path / "first"), adapter_name="first").eval()
    own = {name: tensor for name, tensor in adapter_tensors(model).items() if ".first." in name}
    assert_equal_tensors(adapter_tensors(loaded), own)
    # tensors that are views of a file need not be aligned, and a matrix product then sums in another order
    torch.testing.assert_close(case.logits(loaded), first, rtol=1e-5, atol=1e-6)
    shake(loaded, seed=5)
    assert not torch.equal(case.logits(loaded), first)
    hotswap_adapter(loaded, str(tmp_path / "first"), adapter_name="first", torch_device="cpu")
    assert_equal_tensors(adapter_tensors(loaded), own)
    torch.testing.assert_close(case.logits(loaded), first, rtol=1e-5, atol=1e-6)


@every_case
def test_two_adapters_and_one_for_each_row(case: Case) -> None:
    model, first = case.model, case.logits()
    model.set_adapter("second")
    second = case.logits()
    model.set_adapter("first")
    assert torch.equal(case.logits(), first)
    assert (second - first).abs().max() > 1e-4
    rows = torch.stack([second[0], first[1], case.expected[2]])
    mixed = case.logits(adapter_names=["second", "first", "__base__"])
    torch.testing.assert_close(mixed, rows, rtol=1e-4, atol=3e-5)
    alone = copy.deepcopy(model)
    alone.delete_adapter("second")
    assert torch.equal(case.logits(alone), first)
    assert not any(".second." in name for name in adapter_tensors(alone))


@every_case
def test_gradient_checkpointing(case: Case) -> None:
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(case.model).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(11)
        found.append(gradients(model, inputs(case.family)))
    routers = [gradient for name, gradient in found[0].items() if "moelora_router" in name]
    assert any(gradient.any() for gradient in routers) is (case.preset != "perft_e")  # it takes the base's router
    assert_close_gradients(found[1], found[0])


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[0] not in ("bert", "vit")], indirect=True, ids="-".join
)
def test_the_cache_changes_no_token(case: Case) -> None:
    batch = {key: value[:2] for key, value in inputs(case.family).items() if key in ("input_ids", "pixel_values")}
    words = {**batch, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = case.model.generate(**words, use_cache=True)
    assert torch.equal(cached, case.model.generate(**words, use_cache=False))
    assert len(cached[0]) >= 6
    mixed = case.model.generate(**words, adapter_names=["first", "__base__"])
    assert torch.equal(mixed[0], cached[0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CAUSAL, indirect=True, ids="-".join)
def test_padding_and_batch_mates(case: Case, side: str) -> None:
    generator = torch.Generator().manual_seed(9)
    ids, mates = torch.randint(3, 90, (1, 7), generator=generator), torch.randint(3, 90, (2, 12), generator=generator)
    place = slice(5, 12) if side == "left" else slice(0, 7)
    row, mask = torch.zeros(1, 12, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)
    row[0, place], mask[0], mask[0, place] = ids[0], 0, 1
    with torch.no_grad():
        alone = case.model(input_ids=ids).logits[0]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        batch = {"input_ids": torch.cat([row, mates]), "attention_mask": mask, "position_ids": positions}
        together = case.model(**batch).logits[0, place]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ("t5", "bert")], indirect=True, ids="-".join)
def test_padding_and_batch_mates_of_encoders(case: Case) -> None:
    batch = inputs(case.family)
    del batch["labels"]
    if case.family == "t5":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4].clamp_min(3)
    with torch.no_grad():
        together = case.model(**batch).logits
        for row in range(3):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            length = int(batch["attention_mask"][row].sum())
            one |= {key: one[key][:, :length] for key in ("input_ids", "attention_mask")}
            torch.testing.assert_close(together[row], case.model(**one).logits[0], rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("case", [("opt", "mixlora")], indirect=True, ids="-".join)
def test_opt_has_whole_mixtures_and_no_mask_is_needed_for_its_rows(case: Case) -> None:
    """Its layers flatten a batch to [B * S, D], and its linears stand beside the attention."""
    layers = {name: layer for name, layer in tuner_layers(case.model).items() if ".fc" in name}
    assert set(layers) == {f"model.decoder.layers.{index}.fc1" for index in range(2)}
    assert all(isinstance(layer, MixtureSplitFeedForward) for layer in layers.values())
    ids = inputs("opt")["input_ids"].clamp_min(3)
    with torch.no_grad():
        mixed = case.model(input_ids=ids, adapter_names=["first", "second", "__base__"]).logits
        expected = case.model(input_ids=ids[:1]).logits
    torch.testing.assert_close(mixed[:1], expected, rtol=1e-5, atol=1e-6)
