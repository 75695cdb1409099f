"""Training that a signal ends with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from moelora.runs.signals import TerminatedError, handled, raise_terminated


class SaveAndStop(TrainerCallback):
    """Ends training at the end of the step in which a signal came, with a checkpoint; a second signal ends it at once.

    Under several processes a signal ends each at once: they would stop at different steps and wait for one another.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listening(self, num_processes: int) -> Iterator[None]:
        """Note signals while the block trains.

        Args:
            num_processes: How many processes train together.

        Raises:
            TerminatedError: At the end, if a signal came.
        """
        if num_processes > 1:
            yield
            return
        with handled(self._note, raise_terminated):
            yield
        if self.number is not None:
            raise TerminatedError(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise TerminatedError(number)
        self.number = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if a signal came."""
        if self.number is not None:
            control.should_save = control.should_training_stop = True
