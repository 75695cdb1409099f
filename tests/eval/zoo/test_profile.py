"""Where the time of a step goes, and one router for linears of the same input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from eval.zoo import shared_routers
from eval.zoo.profile import BALANCE, OTHERS, PARTS, PRODUCTS, PYTHON, SCORES, SELECTION, divide
from moelora import presets
from tests.eval.zoo.test_zoo import run, tiny

__all__ = ["tiny"]


def test_the_backward_of_an_operation_counts_where_its_forward_does() -> None:
    """Of two products one is under a label; autograd goes back through the other first."""
    x, w = torch.randn(30, 30, requires_grad=True), torch.randn(30, 30, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(PYTHON):
        with record_function(SCORES):
            y = x @ w
        (y.sum() + (x @ w).sum()).backward()
    events = profiler.events()
    assert events is not None
    found = divide(events)
    assert set(found) == set(PARTS)
    times = [event.self_cpu_time_total / 1e3 for event in events]
    assert sum(found.values()) == pytest.approx(sum(times))
    products = [time for event, time in zip(events, times, strict=True) if event.name == "aten::mm"]
    of_label, of_other = [products[n] for n in (0, 4, 5)], [products[n] for n in (1, 2, 3)]
    assert found[PRODUCTS] == pytest.approx(sum(of_other))
    assert found[SCORES] >= sum(of_label)
    assert found[OTHERS] > 0
    assert found[PYTHON] > 0
    assert found[BALANCE] == found[SELECTION] == 0


@pytest.mark.usefixtures("tiny")
def test_a_profile_and_its_page(tmp_path: Path) -> None:
    assert run(tmp_path, "--profile", "--only", "mixlora") == 0
    found = json.loads((tmp_path / "profiles" / "mixlora.json").read_text())
    ours, lora = found["milliseconds"]["ours"], found["milliseconds"]["lora"]
    assert list(ours) == list(lora) == list(PARTS)
    for part in (SCORES, SELECTION, BALANCE):
        assert ours[part] > lora[part] == 0, part
    assert 0 < found["flops"]["ours"] != found["flops"]["lora"] > 0
    page = (tmp_path / "profile.md").read_text()
    _, ratio, _, *shares = page.split("| `mixlora` | ")[1].split(" |")[:9]
    assert 1 + sum(float(share.strip(" %")) for share in shares) / 100 == pytest.approx(float(ratio), abs=0.01)
    assert "Not profiled yet" in page
    assert not (tmp_path / "README.md").exists()


@pytest.mark.usefixtures("tiny")
def test_shared_routers_and_their_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_routers, "SEEDS", (1,))
    assert run(tmp_path, "--shared-routers", "--only", "molora") == 0
    found = json.loads((tmp_path / "shared_routers" / "molora-seed1.json").read_text())
    assert set(found["step_seconds"]) == {*shared_routers.PLACEMENTS, "lora"}
    assert found["trainable"]["per_input"] < found["trainable"]["per_site"]
    assert found["losses"]["per_input"] != found["losses"]["per_site"]
    assert found["receipt"]["seeds"] == {"all": 1}
    page = (tmp_path / "shared_routers.md").read_text()
    assert page.count("| `molora` |") == 1
    assert "**Not done yet: sira-seed1, smora-seed1.**" in page


def test_the_presets_that_are_compared_are_those_with_the_word() -> None:
    assert list(shared_routers.PRESETS) == [name for name in presets.available() if "routers" in presets.words(name)]
