"""X-LoRA: the logits and gradients of PEFT's, its folders in both directions, checkpointing and generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import moelora
from moelora.compose import drop_experts, from_loras, read_xlora, switch_experts, write_xlora
from moelora.errors import ComposeError, ConfigError, MoeLoraError
from tests.adapters import outputs, snapshot
from tests.compose.loras import three_loras, unlike_loras
from tests.conftest import tiny_batch, tiny_model

PREFIX = "base_model.internal_xlora_classifier."
CASES: dict[str, dict[str, Any]] = {
    "plain": {"softmax_temperature": 0.5, "global_scaling_weight": 1.7},
    "deep, layerwise": {"xlora_depth": 3, "xlora_size": 8, "layerwise_scalings": True},
    "top-k": {"top_k_lora": 2, "layerwise_scalings": True, "xlora_dropout_p": 0.0, "xlora_depth": 2, "xlora_size": 8},
    "softmax of the top-k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "no softmax": {"enable_softmax": False, "xlora_depth": 2, "xlora_size": 8},
}


def base_without_cache() -> Any:
    """PEFT wants it so."""
    base = tiny_model()
    base.config.use_cache = False
    return base


def peft_xlora(loras: dict[str, str], **words: Any) -> Any:
    """PEFT's X-LoRA with a classifier that tells tokens apart."""
    adapters = {str(index): path for index, path in enumerate(loras.values())}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=36, adapters=adapters, **words)
    model = get_peft_model(base_without_cache(), config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "xlora_classifier" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.5)
    return model


def classifier(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "xlora_classifier" in n}


def save_theirs(model: Any, folder: Path) -> Path:
    """Save it, with the parts of the classifier that PEFT 0.21.2 loses."""
    model.save_pretrained(str(folder))
    save_file(
        {name: tensor.detach() for name, tensor in classifier(model).items()}, folder / "adapter_model.safetensors"
    )
    return folder


def gradients(model: Any, marker: str) -> list[Tensor]:
    model.zero_grad()
    model(**tiny_batch()).loss.backward()
    return [p.grad.clone() for name, p in model.named_parameters() if marker in name and p.grad is not None]


@pytest.mark.parametrize("make", [three_loras, unlike_loras], ids=["alike", "unlike"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_pefts(case: str, make: Any, tmp_path: Path) -> None:
    """Logits and the classifier's gradients, read from PEFT's folder; and written, PEFT loads the same."""
    theirs = peft_xlora(make(tmp_path), **CASES[case])
    expected = outputs(theirs)
    assert not torch.allclose(expected, outputs(tiny_model()), atol=1e-2)
    ours = read_xlora(save_theirs(theirs, tmp_path / "theirs"), tiny_model())
    torch.testing.assert_close(outputs(ours), expected, rtol=1e-4, atol=1e-4)
    found = gradients(ours, "moelora_router")
    assert len(found) == len(classifier(theirs))
    assert all(gradient.any() for gradient in found)
    for gradient, of_peft in zip(found, gradients(theirs, "xlora_classifier"), strict=True):
        # of the last linear ours is by expert and site, PEFT's one list by site and expert
        listed = gradient if gradient.shape == of_peft.shape else gradient.transpose(0, 1).flatten(0, 1)
        torch.testing.assert_close(listed, of_peft, rtol=1e-3, atol=1e-5)
    write_xlora(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(base_without_cache(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(outputs(again), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(read_xlora(tmp_path / "ours", tiny_model())), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def mixture(tmp_path: Path) -> Any:
    """Of three LoRAs, layerwise, with a top-k."""
    words = {"depth": 2, "size": 8, "layerwise": True, "top_k": 2, "dropout": 0.0}
    model = from_loras(tiny_model(), three_loras(tmp_path), {"kind": "xlora", **words})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "moelora_router" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    return model


def test_the_router_alone_is_trained(mixture: Any) -> None:
    assert {name.split("moelora_")[1] for name, p in mixture.named_parameters() if p.requires_grad} == {
        f"router.default.{kind}_{i}" for kind in ("weight", "bias") for i in (0, 1)
    }
    with moelora.record_routing(mixture) as listener:
        mixture(**tiny_batch())
    first, second = (record.routing.logits_TE for record in listener.records[:2])
    assert not torch.allclose(first, second), "each site has its own"


def test_saved_and_loaded(mixture: Any, tmp_path: Path) -> None:
    mixture.save_pretrained(str(tmp_path / "mix"))
    again = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "mix")).eval()
    assert torch.equal(outputs(again), outputs(mixture))


@pytest.mark.parametrize("layerwise", [False, True])
def test_an_expert_less(layerwise: bool, tmp_path: Path) -> None:
    """Dropped from the folder or switched off: the softmax, with its temperature, over the others."""
    router = {"kind": "xlora", "depth": 2, "size": 8, "layerwise": layerwise, "temperature": 0.3}
    model = from_loras(tiny_model(), three_loras(tmp_path), router)
    model.save_pretrained(str(tmp_path / "mix"))
    drop_experts(tmp_path / "mix", tmp_path / "less", ["words"])
    less = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "less")).eval()
    whole = outputs(model)
    switch_experts(model, {"words": False})
    torch.testing.assert_close(outputs(less), outputs(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(model), whole, atol=1e-3)


def test_checkpointing(mixture: Any) -> None:
    """The same gradients; the reentrant kind is refused, since it would lose them."""
    mixture.train()
    expected = gradients(mixture, "moelora_router")
    base = mixture.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    for gradient, plain in zip(gradients(mixture, "moelora_router"), expected, strict=True):
        torch.testing.assert_close(gradient, plain)
    base.activation_checkpointing_disable()
    base.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(MoeLoraError, match="use_reentrant': False"):
        mixture(**tiny_batch())


def test_padding_packing_and_batch_mates(mixture: Any) -> None:
    """A sequence alone, left-padded, in a batch or packed with another has the same logits."""
    one, two = torch.randint(3, 90, (1, 6)), torch.randint(3, 90, (1, 9))
    with torch.no_grad():
        alone = mixture(input_ids=one).logits
        mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 6)], 1).long()
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), one], 1)
        together = mixture(
            input_ids=torch.cat([padded, two]), attention_mask=torch.cat([mask, torch.ones_like(mask)])
        ).logits[:1, 3:]
        positions = torch.cat([torch.arange(9), torch.arange(6)]).unsqueeze(0)
        packed = mixture(input_ids=torch.cat([two, one], 1), position_ids=positions, use_cache=False).logits[:, 9:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_rows_of_several_adapters(mixture: Any) -> None:
    """`adapter_names`: each row has what its adapter gives."""
    expected, base = outputs(mixture), outputs(tiny_model())
    found = outputs(mixture, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(found, torch.stack([expected[0], base[1], expected[2]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [{"do_sample": False}, {"num_beams": 3, "use_cache": True}], ids=str)
def test_generation_runs_without_a_cache(mixture: Any, words: dict[str, Any]) -> None:
    """Greedy: each token is the most likely one of a whole forward."""
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(1))
    words = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, **words}
    found = mixture.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **words)
    with torch.no_grad():
        if "num_beams" not in words:
            expected = ids
            for _ in range(4):
                following = mixture(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                expected = torch.cat([expected, following], 1)
            assert torch.equal(found, expected)
        first = mixture(input_ids=ids, use_cache=True)
        with pytest.raises(ConfigError, match="a first pass .* continues a KV cache"):
            mixture(input_ids=ids[:, :1], past_key_values=first.past_key_values)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    loras = three_loras(tmp_path, model="t5", target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    model = from_loras(tiny_model("t5"), loras, "xlora")
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        outputs(model, "t5")


def _edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _lose(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.3." not in name}, file)


BROKEN: dict[str, tuple[Any, str]] = {
    "no folder": (lambda f: (f / "adapter_config.json").unlink(), "cannot be read as an adapter"),
    "no X-LoRA": (lambda f: _edit(f, adapters={}), "XLORA with 0 adapters"),
    "first pass": (lambda f: _edit(f, scaling_pass_value=0.5), "scaling_pass_value=0.5"),
    "two softmaxes": (lambda f: _edit(f, enable_softmax_topk=True, top_k_lora=2), "a softmax of a softmax"),
    "what PEFT loses": (_lose, r"lacks \['base_model.internal_xlora_classifier.layers.3.bias"),
    "no classifier": (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot be read"),
    "other size": (lambda f: _edit(f, layerwise_scalings=True), r"has weight_1 \[3, 8\]; allowed: \[42, 8\]"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a deep classifier."""
    folder = tmp_path_factory.mktemp("xlora")
    model = from_loras(tiny_model(), three_loras(folder), {"kind": "xlora", "depth": 2, "size": 8})
    write_xlora(model, folder / "whole")
    return folder / "whole"


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_read(fault: str, written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(written, folder)
    spoil, message = BROKEN[fault]
    spoil(folder)
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(ComposeError, match=message):
        read_xlora(folder, base)
    assert snapshot(base) == before


def test_what_cannot_be_written(written: Path, tmp_path: Path) -> None:
    loras = three_loras(tmp_path)
    model = from_loras(tiny_model(), loras, "uniform")
    with pytest.raises(
        ComposeError, match="'scores': 'constant'.* allowed: a mixture of LoRAs with the router 'xlora'"
    ):
        write_xlora(model, tmp_path / "x")
    router = {"kind": "xlora", "temperature": 2.0, "top_k": 2, "renormalize": True}
    model = from_loras(tiny_model(), loras, router)
    with pytest.raises(ComposeError, match="has no words for the selection"):
        write_xlora(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ComposeError, match="exists; allowed: a folder that does not"):
        write_xlora(read_xlora(written, tiny_model()), written)
    with pytest.raises(ConfigError, match="router.renormalize is True; allowed: False without a top_k"):
        from_loras(tiny_model(), loras, {"kind": "xlora", "renormalize": True})
