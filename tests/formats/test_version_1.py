"""Adapters written in format version 1 load, mean the same, and give the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor

from moelora.errors import ConfigError
from moelora.formats import upgrade_keys
from tests.adapters import outputs, shake
from tests.conftest import tiny_model
from tests.formats.write_version_1 import FIXTURES, FOLDER, SECOND, Fixture, expected

NAMES = tuple(FIXTURES)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
# What a configuration says of where and by what it was written, not of what it means.
CIRCUMSTANCES = {
    "format_version",
    "moelora_version",
    "peft_version",
    "inference_mode",
    "base_model_name_or_path",
    "base_fingerprint",
    "revision",
}


def current_key(key: str) -> str:
    """Today's key of a tensor that version 1 calls `key`."""
    (found,) = upgrade_keys({key: None})
    return found


def load(name: str, folder: Path | None = None) -> Any:
    return PeftModel.from_pretrained(tiny_model(FIXTURES[name].model), str(folder or FOLDER / name))


def meaning(config: Any) -> dict[str, Any]:
    words: dict[str, Any] = config.to_dict()
    return {
        key: sorted(set(value)) if isinstance(value, (set, list)) and key != "balance" else value
        for key, value in words.items()
        if key not in CIRCUMSTANCES
    }


def assert_stored(found: dict[str, Tensor], folder: Path, keys: set[str] | None = None) -> None:
    """Equal to the stored logits; these come from one CPU, and another may sum in another order."""
    stored = load_file(folder / "expected.safetensors")
    assert found.keys() == (keys or stored.keys())
    for key, logits in found.items():
        # near ties of a router carry a CPU's rounding further than a sum does
        torch.testing.assert_close(logits, stored[key], atol=2e-4 * stored[key].abs().max().item(), rtol=0.0)


def assert_tensors_of_the_file(model: Any, folder: Path, adapter_name: str = "default") -> None:
    file = {current_key(key): tensor for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    loaded = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    assert loaded.keys() == file.keys()
    for key, tensor in file.items():
        assert loaded[key].dtype == tensor.dtype, key
        assert torch.equal(loaded[key], tensor), key


def test_every_fixture_is_there_and_of_version_1() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(NAMES)
    for path in FOLDER.rglob("adapter_config.json"):
        assert json.loads(path.read_text())["format_version"] == 1
    assert len(list(FOLDER.rglob("adapter_config.json"))) == len(NAMES) + 1
    assert all(path.stat().st_size < 60_000 for path in FOLDER.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str) -> None:
    found = expected(FIXTURES[name], load(name))
    assert_stored(found, FOLDER / name, {"logits"} if name == "two_adapters" else None)
    base = outputs(tiny_model(FIXTURES[name].model), FIXTURES[name].model)
    assert (found["logits"] - base).abs().max() > 1e-3, "the adapter changes nothing"


@pytest.mark.parametrize("name", NAMES)
def test_tensors_bit_for_bit(name: str) -> None:
    assert_tensors_of_the_file(load(name), FOLDER / name)


@pytest.mark.parametrize("part", ["routing", "balance"])
def test_a_configuration_without_a_part_is_refused(part: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(FOLDER / "sira", folder)
    words = json.loads((folder / "adapter_config.json").read_text())
    del words[part]
    (folder / "adapter_config.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match=rf"configuration \(format version 1\) lacks {part}; allowed: all of"):
        load("sira", folder)


def test_hot_swap() -> None:
    model = load("mixlora")
    shake(model)
    hotswap_adapter(model, str(FOLDER / "mixlora"), adapter_name="default", torch_device="cpu")
    assert_tensors_of_the_file(model, FOLDER / "mixlora")


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    model = load(name)
    model.save_pretrained(str(tmp_path))
    again = load(name, tmp_path)
    assert meaning(again.peft_config["default"]) == meaning(model.peft_config["default"])
    logits = expected(FIXTURES[name], again)
    for key, old in expected(FIXTURES[name], load(name)).items():
        assert torch.equal(logits[key], old), key


def placed(fixture: Fixture) -> Any:
    """The configuration of the fixture's words as an adapter holds it, with its targets resolved."""
    return get_peft_model(tiny_model(fixture.model), fixture.config()).peft_config["default"]


@pytest.mark.parametrize("name", NAMES)
def test_it_means_what_its_words_mean_today(name: str) -> None:
    assert meaning(load(name).peft_config["default"]) == meaning(placed(FIXTURES[name]))


def test_two_adapters_in_one_model() -> None:
    folder = FOLDER / "two_adapters"
    model = load("two_adapters")
    model.load_adapter(str(folder / "second"), adapter_name="second")
    assert_tensors_of_the_file(model, folder)
    assert_tensors_of_the_file(model, folder / "second", "second")
    assert meaning(model.peft_config["second"]) == meaning(placed(SECOND))
    found: dict[str, Tensor] = {}
    for key, active in (
        ("logits", "default"),
        ("logits_second", "second"),
        ("logits_both", ["default", "second"]),
    ):
        model.base_model.set_adapter(active)
        found[key] = outputs(model.eval())
    assert_stored(found, folder)
    assert not torch.equal(found["logits"], found["logits_second"])
