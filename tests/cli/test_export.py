"""`moelora export`."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from moelora_cli import main
from tests.export.bases import save_pair


def test_it_prints_what_was_written_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pair(tmp_path, "smollm2")
    out = tmp_path / "moe"
    assert main(["export", str(tmp_path / "adapter"), "--to", "native-moe", str(out)]) == 0
    lines = {line[:16].strip(): line[16:] for line in capsys.readouterr().out.splitlines()}
    assert lines["architecture"] == "MixtralForCausalLM"
    assert lines["experts"] == "4 in each block, 2 per token"
    count = AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert lines["parameters"].startswith(f"{count:,} (the base has ")
    assert lines["check"].startswith("on 128 tokens in float32 logits differ by at most ")
    assert lines["check"].endswith("greedy tokens are the same")
    assert "the native router chooses other experts" in lines["in bfloat16"]


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pair(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    words = ["--base", str(tmp_path / "moved"), "--dtype", "bfloat16", "--max-shard-size", "40KB", "--no-check"]
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "moe"), "--to", "native-moe", *words]) == 0
    printed = capsys.readouterr().out
    assert "files, bfloat16" in printed
    assert "check" not in printed


def test_too_little_memory_to_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pair(tmp_path)
    monkeypatch.setattr("moelora_cli.export_native_moe._free_memory", lambda: 1000)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "moe"), "--to", "native-moe"]) == 0
    assert "not checked: that takes" in capsys.readouterr().out


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pair(tmp_path, "llama", "sira")
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "moe"), "--to", "native-moe"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moelora export: the adapter's placement is 'linear'")
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_unknown_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["export", "a", "b", "--to", "onnx"])
    assert exit_.value.code == 2
    assert "native-moe" in capsys.readouterr().err
