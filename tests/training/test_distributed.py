"""Two processes (gloo), data-parallel or under FSDP2, equal one: loss, gradients, balance losses, load, biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from moelora.errors import TargetError
from tests.adapters import adapted, adapter_tensors
from tests.conftest import tiny_model
from tests.training.processes import ACCELERATE_FSDP, accelerate_launch, run_two_processes
from tests.training.runs import assert_same_gradients, toy_rows, train
from tests.training.two_fsdp_processes import CASES as FSDP_CASES
from tests.training.two_fsdp_processes import trained
from tests.training.two_processes import CASES, OTHERS, SMORA, checkpointed, mean_gradients

pytestmark = pytest.mark.distributed


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """All cases in one test: starting the processes takes far longer than running them."""
    straight = checkpointed(f"{tmp_path}/results-one", 1)
    ranks = run_two_processes("tests.training.two_processes", tmp_path / "results")
    for name, run in CASES.items():
        expected = run(1)
        for rank in ranks:
            found = rank[name]
            for log, wanted in zip(found["logs"], expected["logs"], strict=True):
                assert log == pytest.approx(wanted, rel=1e-5, abs=1e-6), name
            for gradients, step in zip(found["gradients"], expected["gradients"], strict=True):
                assert_same_gradients(gradients, step)
            assert found["biases"].keys() == expected["biases"].keys(), name
            assert (len(expected["biases"]) > 0) == name.startswith("smora")
            for key, bias_E in expected["biases"].items():
                assert bias_E.abs().max() > 0
                torch.testing.assert_close(found["biases"][key], bias_E, rtol=0, atol=1e-7)
    for preset in OTHERS:
        expected_gradients = mean_gradients(preset)
        assert expected_gradients
        for rank in ranks:
            assert_same_gradients(rank["others"][preset], expected_gradients)
    # a checkpoint of one process goes on with two, and of two with one
    resumed = checkpointed(f"{tmp_path}/results-two", 1, resume=True)
    for found in (resumed, *(rank[name] for rank in ranks for name in ("saved", "resumed"))):
        assert found.keys() == straight.keys()
        for key, tensor in straight.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)


def test_one_process_alone_would_move_the_biases_otherwise() -> None:
    """Guards the test above: its rows are unlike enough that the counts of both processes are needed."""
    both = adapter_tensors(train(adapted("smora", **SMORA), toy_rows(8)[:4]).trainer.model)
    alone = adapter_tensors(train(adapted("smora", **SMORA), toy_rows(8)[:2], batch=2).trainer.model)
    assert any(not torch.equal(alone[name], tensor) for name, tensor in both.items() if name.endswith(".bias"))


def test_fsdp_of_two_processes_equals_one(tmp_path: Path) -> None:
    """Each holds half of every parameter; loss, gradients' norm and the saved adapter are those of one process."""
    environment = accelerate_launch(ACCELERATE_FSDP)
    ranks = run_two_processes("tests.training.two_fsdp_processes", tmp_path / "two", environment)
    expected = {name: trained(tmp_path / f"one-{name}", 1, **words) for name, words in FSDP_CASES.items()}
    expected["resumed"] = expected["plain"]
    for rank in ranks:
        assert rank.keys() == expected.keys()
        for name, found in rank.items():
            assert found["fsdp"]
            assert found["sharded"] == found["parameters"] == expected[name]["parameters"]
            assert found["elements_here"] == pytest.approx(expected[name]["elements_here"] / 2, rel=0.1)
            for log, wanted in zip(found["logs"], expected[name]["logs"], strict=True):
                assert log == pytest.approx(wanted, rel=1e-4), name
    for name in FSDP_CASES:
        one, two = (
            load_file(tmp_path / f"{count}-{name}/adapter/adapter_model.safetensors") for count in ("one", "two")
        )
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=2e-5)
    # the base is known, though the process that saves has a half of each weight
    folder = str(tmp_path / "two-plain/adapter")
    PeftModel.from_pretrained(tiny_model(), folder)
    other = tiny_model()
    other.lm_head.weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    with pytest.raises(TargetError, match="the values of lm_head.weight are others"):
        PeftModel.from_pretrained(other, folder)
