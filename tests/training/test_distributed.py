"""Two data-parallel processes (gloo, started by torchrun) equal one: loss, gradients, balance losses, load, biases."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import adapted, adapter_tensors
from tests.training.runs import assert_same_gradients, toy_rows, train
from tests.training.two_processes import CASES, SMORA

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the two processes."""
    path = tmp_path_factory.mktemp("two_processes") / "results"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*command, "-m", "tests.training.two_processes", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, ranks: list[dict[str, Any]]) -> None:
    expected = CASES[name](1)
    for rank in ranks:
        found = rank[name]
        for log, wanted in zip(found["logs"], expected["logs"], strict=True):
            assert log == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        for gradients, step in zip(found["gradients"], expected["gradients"], strict=True):
            assert_same_gradients(gradients, step, 2e-4)
        assert found["biases"].keys() == expected["biases"].keys()
        for key, bias_E in expected["biases"].items():
            torch.testing.assert_close(found["biases"][key], bias_E, rtol=0, atol=1e-7)


def test_the_processes_saw_unlike_rows(ranks: list[dict[str, Any]]) -> None:
    """Guards the test above: the counts of one process alone would have moved the biases otherwise."""
    whole = ranks[0]["smora"]["biases"]
    assert all(bias_E.abs().max() > 0 for bias_E in whole.values())
    half = train(adapted("smora", **SMORA), toy_rows(8)[:2], batch=2)
    found = adapter_tensors(half.trainer.model)
    first = train(adapted("smora", **SMORA), toy_rows(8)[:4], batch=4)
    expected = adapter_tensors(first.trainer.model)
    assert any(not torch.equal(found[name], expected[name]) for name in whole)
