"""What a run shows while it trains: one bar with live values, or one line per log where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from moelora.runs.wording import minutes

# Names in the trainers' logs, and how they are shown.
_SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("balance_loss", "balance", "{:.3f}"),
    ("token_accuracy", "accuracy", "{:.0%}"),
    ("mean_token_accuracy", "accuracy", "{:.0%}"),
    ("rewards/accuracies", "accuracy", "{:.0%}"),
    ("rewards/margins", "margin", "{:.3f}"),
    ("reward", "reward", "{:.3f}"),
    ("expert_load/busiest", "busiest expert", "{:.0%}"),
    ("expert_load/dead", "dead experts", "{:.0f}"),
    ("eval_loss", "eval loss", "{:.3f}"),
    ("learning_rate", "lr", "{:.1e}"),
)


def summarize(logs: dict[str, Any]) -> str:
    """The values of a log that a person watches, as one line."""
    return "  ".join(f"{label} {form.format(logs[key])}" for key, label, form in _SHOWN if key in logs)


class LiveProgress(TrainerCallback):
    """Shows the steps and the latest log.

    Args:
        label: Name of what trains.
        interactive: Whether to redraw one bar; None asks whether standard error is a terminal.
    """

    def __init__(self, label: str, interactive: bool | None = None) -> None:
        self.label = label
        self.interactive = sys.stderr.isatty() if interactive is None else interactive
        self.bar: Any = None
        self.started, self.first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the bar from the step at which the run starts."""
        self.started, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.interactive:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the latest values; the summary at the end of training is the program's own."""
        line = summarize(logs or {})
        if not line or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        else:
            seconds = time.monotonic() - self.started
            done, left = state.global_step - self.first, state.max_steps - state.global_step
            rest = f", {minutes(seconds / done * left)} left" if done and left else ""
            print(
                f"{self.label}  step {state.global_step}/{state.max_steps}  {line}  {seconds:.0f} s{rest}", flush=True
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
