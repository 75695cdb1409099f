"""An adapter knows the base model that it was saved on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from moelora import MoeLoraConfig
from moelora.errors import ConfigError, TargetError
from moelora.fingerprint import fingerprint
from tests.adapters import adapted, outputs, small_config
from tests.conftest import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    adapted("mixlora").save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def load(base: Any, folder: str) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder)
    return model, [str(each.message) for each in caught if "base model" in str(each.message)]


def shifted(base: Any, share: float) -> Any:
    """A base whose weights have moved by a share of their size, as by fine-tuning."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += share * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return base


def test_what_is_saved(saved: str) -> None:
    found = json.loads((Path(saved) / "adapter_config.json").read_text())["base_fingerprint"]
    assert (found["architecture"], found["quantization"]) == ("llama", "none")
    names = dict(tiny_model().named_parameters())
    assert len(found["weights"]) == 3
    assert found["weights"].keys() <= names.keys()
    assert found == fingerprint(tiny_model())  # an adapter on it, or not
    assert len(json.dumps(found)) < 2000


def test_the_same_base_in_another_precision_is_the_same(saved: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert load(tiny_model().to(dtype), saved)[1] == []


def test_another_base_is_refused(saved: str) -> None:
    base = shifted(tiny_model(), 3.0)
    before = outputs(base)
    with pytest.raises(TargetError, match=r"not the one .*: the values of .*embed_tokens.weight are others"):
        PeftModel.from_pretrained(base, saved)
    assert torch.equal(outputs(base), before)


def test_a_revision_of_the_base_is_warned_of(saved: str) -> None:
    _, said = load(shifted(tiny_model(), 0.05), saved)
    assert len(said) == 1
    assert "differs a little" in said[0]
    assert "another revision or a fine-tuned copy" in said[0]


def test_another_quantization_is_warned_of(saved: str) -> None:
    base = tiny_model()
    base.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    _, said = load(base, saved)
    assert len(said) == 1
    assert "quantization 'none', and this one has 'bitsandbytes nf4'" in said[0]


def test_a_vocabulary_that_has_grown_is_the_same_base(saved: str) -> None:
    base = tiny_model()
    base.resize_token_embeddings(105)
    assert load(base, saved)[1] == []


def test_an_adapter_without_a_fingerprint_loads_anywhere(saved: str, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((Path(saved) / name).read_bytes())
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    del words["base_fingerprint"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(words))
    model, said = load(shifted(tiny_model(), 3.0), str(tmp_path))
    assert said == []
    assert model.peft_config["default"].base_fingerprint is None
    words["base_fingerprint"] = {"weights": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(words))
    with pytest.raises(TargetError, match="base_fingerprint of the adapter's configuration is {'weights': 3}; allowed"):
        PeftModel.from_pretrained(tiny_model(), str(tmp_path))


def test_a_configuration_is_free_to_be_used_on_another_base(tmp_path: Path) -> None:
    config = small_config("sira")
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path, save_embedding_layers=False)
    other = shifted(tiny_model(), 3.0)
    model = get_peft_model(other, config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert config.base_fingerprint == fingerprint(other)
    assert load(shifted(tiny_model(), 3.0), str(tmp_path))[1] == []


def test_it_is_no_word_of_a_preset() -> None:
    with pytest.raises(ConfigError, match="unknown key 'base_fingerprint'"):
        MoeLoraConfig.from_preset("sira", base_fingerprint={})


def test_a_module_that_is_saved_whole_is_the_adapters(tmp_path: Path) -> None:
    """A classifier's head starts at random each time that the base is loaded."""
    model = adapted("sira", "bert")
    assert any("classifier" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    base = tiny_model("bert")
    base.classifier.weight.data.normal_(std=3.0)
    assert load(base, str(tmp_path))[1] == []
    assert torch.equal(outputs(base, "bert"), outputs(model, "bert"))


def test_a_base_without_weights_has_none() -> None:
    with torch.device("meta"):
        assert fingerprint(tiny_model()) is None
