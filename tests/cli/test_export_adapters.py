"""The command `moelora export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from moelora import MoeLoraConfig
from moelora_cli import main
from tests.adapters import adapted, outputs, shake, small_config
from tests.export.mixtures import base_folder, composition, saved, with_lora
from tests.runs.tiny import tiny_folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder(tmp_path / "base")


def run(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_to_lora(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved(composition(base), tmp_path / "adapter")
    assert run(adapter, tmp_path / "out", "--to", "lora") == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.splitlines() == [
        str(out),
        "  LoRAs       3: code (rank 2), maths (rank 4), prose (rank 3)",
        "  router      by a task's number, in route.py, router.json",
        f"  base model  {base}",
        f"  next        python {out}/route.py NUMBER    (prints the LoRA of a request)",
    ]
    assert (tmp_path / "out" / "code" / "adapter_model.safetensors").is_file()


def test_names_that_are_changed_are_said(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = composition(base, changes={"names": ["EU law", "a/b", "prose"]})
    assert run(saved(model, tmp_path / "adapter"), tmp_path / "out", "--to", "lora") == 0
    assert "  renamed     'EU law' is EU-law, 'a/b' is a-b" in capsys.readouterr().out.splitlines()
    router = json.loads((tmp_path / "out/router.json").read_text())
    assert router["renamed"] == {"EU-law": "EU law", "a-b": "a/b"}
    assert router["loras"] == {"-1": None, "0": "EU-law", "1": "a-b", "2": "prose"}


def test_to_one_lora_of_a_fixed_mix(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved(composition(base, scores="constant"), tmp_path / "adapter")
    assert run(adapter, tmp_path / "out", "--to", "lora") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  LoRA        one, ranks 8 to 9"  # at down_proj "code" is 0, one row of it
    assert lines[2].startswith("  next        peft.PeftModel.from_pretrained(base, ")


def test_to_one_lora_without_data(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved(adapted("sira"), tmp_path / "adapter")
    assert run(adapter, tmp_path / "out", "--to", "lora", "--rank", 2, "--base", base) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "out")
    assert lines[1] == "  LoRA        one, rank 2"
    assert lines[2].startswith("  One LoRA of rank 2 keeps ")
    assert "not measured" in lines[3]
    assert lines[4].startswith("  next ")


@pytest.mark.parametrize("form", ["chat", "text", "tasks"])
def test_to_one_lora_on_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny_folder(tmp_path / "tiny")
    rows: list[dict[str, Any]] = [{"text": f"a text of {n}"} for n in range(12)]
    config = small_config("sira")
    if form != "text":
        rows = [{"prompt": f"double {n}", "completion": str(2 * n), "task": "ab"[n % 2]} for n in range(12)]
    if form == "tasks":
        experts = {"kind": "lora_composed", "num_experts": 2, "r": 2, "lora_alpha": 2, "names": ["a", "b"]}
        config = MoeLoraConfig(experts=experts, scores="task", selection="dense", task_type="CAUSAL_LM")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    shake(model)
    adapter = saved(model, tmp_path / "adapter")
    words = ["--to", "lora", "--rank", 4, "--data", tmp_path / "rows.jsonl", "--steps", 2]
    capsys.readouterr()
    assert run(adapter, tmp_path / "out", *words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[-5:-1]] == ["base", "mixture", "LoRA", "after"]
    assert lines[-4][2] == "0.0000"  # KL of the mixture to itself
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_mixlora_and_back(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("mixlora")
    adapter = saved(model, tmp_path / "adapter")
    assert run(adapter, tmp_path / "theirs", "--to", "mixlora", "--base", base) == 0
    assert run(tmp_path / "theirs", tmp_path / "ours", "--to", "moelora") == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "theirs"),
        "  experts     4 of rank 3, 2 per token",
        f"  base model  {base}",
        "  files       adapter_config.json, adapter_model.bin, moelora_export.json",
        f"  next        moelora export {tmp_path / 'theirs'} NEW --to moelora    (reads it back)",
        str(tmp_path / "ours"),
        "  experts     4 of rank 3, 2 per token",
        f"  base model  {base}",
        f"  next        moelora inspect {tmp_path / 'ours'}",
    ]
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "adapter_config.json",
        "adapter_model.bin",
        "moelora_export.json",
    ]
    torch.testing.assert_close(outputs(with_lora(base, tmp_path / "ours")), outputs(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "lora"], "token by token"),
        (["--to", "mixlora"], "cannot hold placement 'linear'"),
        (["--to", "moelora"], "peft_type is 'MOELORA'"),
        (["--to", "mixlora", "--rank", "4"], "--rank is 4 without --to lora"),
        (["--to", "lora", "--steps", "4"], "--steps is 4 without --rank"),
        (["--to", "lora", "--rank", "4", "--steps", "4"], "no data to train on"),
        (["--to", "lora", "--rank", "4", "--base", "./none"], "there is no model in that folder"),
        (["--to", "lora", "--rank", "4", "--data", "none.jsonl"], "no file matches 'none.jsonl'"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    base = tiny_folder(tmp_path / "base")
    model = adapted("sira")
    model.peft_config["default"].base_model_name_or_path = str(base)
    adapter = saved(model, tmp_path / "adapter")
    capsys.readouterr()
    assert run(adapter, tmp_path / "out", *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("moelora export: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_form_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, tmp_path / "out", "--to", "gguf")
    assert exit_.value.code == 2
