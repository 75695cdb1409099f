"""The GPU's benchmark on a CPU, with another meter: all of it but the reading of time and memory."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.speed import __main__ as program
from eval.speed import gpu, models
from eval.speed.gpu import Meter
from eval.speed.measure import step
from eval.speed.models import LORA
from eval.speed.run import Run
from tests.conftest import tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def meter() -> Meter:
    ticks = itertools.count()
    return Meter("cpu", "a clock that ticks", lambda: next(ticks), lambda: 0, lambda: 3 << 20)


def tiny_base(name: str, dtype: torch.dtype, **_: Any) -> Any:
    return tiny_model(**SIZES, vocab_size=10000).to(dtype).requires_grad_(False)


def test_the_whole_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mixlora")
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(models, "load_base", tiny_base)
    for name, value in {"TOKENS": (32,), "LENGTH": 16, "DECODED": (2,)}.items():
        monkeypatch.setattr(gpu, name, value)
    full = "SiRA 16 x r=4"
    chosen = {LORA, "MixLoRA", full, "PyPI mixlora 0.2.3"}
    every = gpu.methods
    monkeypatch.setattr(gpu, "methods", lambda base: {n: b for n, b in every(base).items() if n in chosen})

    def step_of(inputs: dict[str, torch.Tensor]) -> Any:
        work = step(inputs)

        def run(model: Any) -> None:
            config = getattr(model, "peft_config", {}).get("default")
            if getattr(config, "preset", None) == "sira":
                raise torch.OutOfMemoryError("CUDA out of memory")
            work(model)

        return run

    monkeypatch.setattr(gpu, "step", step_of)
    gpu.run(tmp_path, 1, meter())
    said = capsys.readouterr().out
    assert f"memory, 32 tokens: {full} does not fit" in said
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["parity"]["gradients"] < 1e-3
    found = {(row["dtype"], row["metric"], row["method"]): row["median"] for row in results["rows"]}
    assert found["bf16", "memory, 32 tokens", LORA] == 3 << 20
    assert found["bf16", "memory, 32 tokens", full] is None
    for dtype in ("bf16", "nf4"):
        for metric in ("step, 32 tokens", "forward, 32 tokens", "decode, batch 2"):
            assert found[dtype, metric, LORA] == found[dtype, metric, "MixLoRA"] == 1
            assert ((dtype, metric, full) in found) is metric.startswith("decode")
            assert ((dtype, metric, "PyPI mixlora 0.2.3") in found) is (dtype == "bf16")
    table = (tmp_path / "gpu.md").read_text()
    assert "a clock that ticks" in table
    assert "| bf16 | memory, 32 tokens | 3.0 MiB | 1.00 | did not fit | 1.00 |" in table


def test_gradients_that_differ_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "gradient_error", lambda base: float("nan"))
    with pytest.raises(SystemExit, match="differ from those of its reference by nan; allowed: 0.001. No timing"):
        gpu.check_gradients(Run(1, [], {}), None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="torch finds no CUDA device here; allowed: --device cpu, or a GPU"):
        program.main(["--device", "cuda", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
