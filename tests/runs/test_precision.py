from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moelora.runs import precision
from moelora.runs.config import load_config, save_config
from tests.runs.test_config import write


@pytest.fixture(params=[9.0, 0.4])
def slowdown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(precision, "cpu_slowdown", lambda dtype: request.param)
    monkeypatch.setattr(precision.torch.accelerator, "is_available", lambda: False)
    return float(request.param)


def test_fastest_is_what_the_machine_computes_fastest_and_a_run_keeps_it(tmp_path: Path, slowdown: float) -> None:
    config = load_config(write(tmp_path, dtype="fastest", adapter_dtype="base"))
    assert config.dtype == ("float32" if slowdown > 1.5 else "bfloat16")
    save_config(config, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["dtype"] == config.dtype
    assert load_config(tmp_path / "config.yaml") == config


def test_a_slow_data_type_is_named_with_what_to_do(slowdown: float, capsys: pytest.CaptureFixture[str]) -> None:
    precision.say_if_slow("bfloat16")
    line = "Slow      this CPU computes bfloat16 9 times slower than float32: set dtype to float32\n"
    assert capsys.readouterr().out == (line if slowdown > 1.5 else "")
    precision.say_if_slow("float32")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("emulated", "expected"), [(True, "float32"), (False, "bfloat16")])
def test_a_gpu_without_bfloat16_takes_float32(monkeypatch: pytest.MonkeyPatch, emulated: bool, expected: str) -> None:
    torch = precision.torch
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    assert precision.fastest_dtype() == expected


def test_the_time_of_a_product_is_measured() -> None:
    assert precision.cpu_slowdown("float32") == pytest.approx(1, abs=0.9)
    assert precision.cpu_slowdown("bfloat16") > 0.05
