from __future__ import annotations

from types import SimpleNamespace

import pytest

from moelora.runs.progress import LiveProgress, summarize
from moelora.runs.wording import minutes


def test_a_log_becomes_a_line() -> None:
    logs = {
        "loss": 1.23456,
        "balance_loss": 1.0201,
        "learning_rate": 2e-4,
        "grad_norm": 3.0,
        "expert_load/busiest": 0.25,
    }
    assert summarize(logs) == "loss 1.235  balance 1.020  busiest expert 25%  lr 2.0e-04"
    assert summarize({"train_runtime": 3.0}) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s")])
def test_durations(seconds: float, text: str) -> None:
    assert minutes(seconds) == text


@pytest.mark.parametrize("interactive", [False, True])
def test_progress_shows_steps_and_values(capsys: pytest.CaptureFixture[str], interactive: bool) -> None:
    progress = LiveProgress("adapter", interactive=interactive)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=9, global_step=3)
    progress.on_train_begin(None, state, None)
    state.global_step = 4
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, logs={"loss": 0.5})
    progress.on_log(None, state, None, logs={"train_runtime": 1.0})
    progress.on_train_end(None, state, None)
    shown = "".join(capsys.readouterr())
    assert "adapter" in shown
    assert "4/9" in shown
    assert interactive or " s, 0 s left" in shown
    assert "loss 0.500" in shown
    assert "train_runtime" not in shown
