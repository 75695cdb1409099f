"""What a stopped run needs of its trainer, whichever that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class Resumable(_Base):
    """Put first: `class RunTrainer(Resumable, MoeLoraDPOTrainer)`."""

    def resume_finished(self, checkpoint: Path) -> None:
        """Take weights and state of a checkpoint after which there is nothing left to train.

        `train` would make one more step. The optimizer is not read.
        """
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # PEFT gives an adapter in half precision float32 when it reads one
        before = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != before[name]:
                parameter.data = parameter.data.to(before[name])
