"""A saved adapter is trained further: a composition's router over its frozen experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moelora_cli import main as moelora
from tests.runs.tiny import WORDS, tiny_folder
from train.__main__ import main as train


@pytest.fixture
def loras(tmp_path: Path) -> list[str]:
    """Two LoRAs of the tiny base, named after two tasks."""
    base = tiny_folder(tmp_path / "base")
    words = []
    for seed, name in enumerate(("gcd", "letter_counting")):
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in model.named_parameters():
            if "lora_B" in key:
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        model.save_pretrained(str(tmp_path / name))
        words.append(f"{name}={tmp_path / name}")
    return words


def write_config(tmp_path: Path, adapter: dict[str, Any]) -> Path:
    words = {**WORDS, "model": str(tmp_path / "base"), "adapter": adapter, "output_dir": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(words))
    return tmp_path / "run.yaml"


def test_compose_then_train(tmp_path: Path, loras: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert moelora(["compose", *loras, "--router", "{kind: topk, top_k: 2}", "-o", str(tmp_path / "mix")]) == 0
    printed = capsys.readouterr().out
    assert "Expert    gcd: rank 2" in printed
    assert f"Next      moelora inspect {tmp_path / 'mix'}" in printed
    assert train([str(write_config(tmp_path, {"path": str(tmp_path / "mix")}))]) == 0
    before = load_file(tmp_path / "mix" / "adapter_model.safetensors")
    after = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "moelora_router" in key}


def test_compose_by_centroids_from_a_file(tmp_path: Path, loras: list[str]) -> None:
    """The configuration of a composition, with the rows of its dataset."""
    words = {
        "model": str(tmp_path / "base"),
        "loras": dict(pair.split("=") for pair in loras),
        "router": {"kind": "centroids", "unknown": False},
        "dataset": {**WORDS["dataset"], "rows_per_task": 4},
        "output_dir": str(tmp_path / "mix"),
    }
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(words))
    assert moelora(["compose", "--config", str(tmp_path / "compose.yaml")]) == 0
    config = json.loads((tmp_path / "mix" / "adapter_config.json").read_text())
    assert (config["scores"]["kind"], config["placement"]["routers"]) == ("centroids", "per_model")
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    stored = load_file(tmp_path / "mix" / "adapter_model.safetensors")
    assert [tensor.shape for key, tensor in stored.items() if key.endswith("centroids")] == [(2, 36)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--router", "arrow"], "loras is missing; give LORA"),
        (["{gcd}", "x", "--router", "arrow"], "some LoRAs have a name and some do not"),
        (["a=x", "a=y", "--router", "arrow"], "two LoRAs have the same name (a=x a=y)"),
        (["{gcd}"], "output_dir is missing; give -o FOLDER"),
        (["{gcd}", "--router", "arow", "-o", "{out}"], "composition is 'arow'; allowed: a kind ("),
        (["{gcd}", "--router", "{{kind: [", "-o", "{out}"], "is no YAML"),
        (["{gcd}", "--router", "centroids", "-o", "{out}"], "there are none for gcd"),
        (["{gcd}", "--data", "{rows}", "--router", "centroids", "-o", "{out}"], "have no column task"),
        (["{gcd}", "-o", "{exists}"], "exists; allowed: a folder that does not"),
        (["a={exists}", "-o", "{out}"], "cannot be read as an adapter"),
        (["{gcd}", "--base", "./nothing", "-o", "{out}"], "there is no model in that folder"),
    ],
)
def test_what_cannot_be_composed(
    words: list[str], message: str, tmp_path: Path, loras: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and nothing is left."""
    (tmp_path / "exists").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    places = {"gcd": loras[0], "out": tmp_path / "out", "exists": tmp_path / "exists", "rows": tmp_path / "rows.jsonl"}
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert moelora(["compose", *(word.format(**places) for word in words)]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"path": "{mix}", "r": 4}, "adapter has path and r; allowed: path alone"),
        ({"path": "{mix}/nothing"}, "is no folder of an adapter"),
        ({"path": "{lora}"}, "is of PEFT type LORA"),
        ({"path": "{mix}"}, "has nothing to train"),
    ],
)
def test_what_cannot_be_trained_further(
    adapter: dict[str, Any], message: str, tmp_path: Path, loras: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert moelora(["compose", *loras, "--router", "arrow", "-o", str(tmp_path / "mix")]) == 0
    places = {"mix": str(tmp_path / "mix"), "lora": str(tmp_path / "gcd")}
    words = {key: value.format(**places) if isinstance(value, str) else value for key, value in adapter.items()}
    capsys.readouterr()
    assert train([str(write_config(tmp_path, words))]) == 1
    assert message in capsys.readouterr().err
