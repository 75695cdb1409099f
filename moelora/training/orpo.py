"""TRL's odds-ratio preference optimisation with the balance losses; it needs the extra `moelora[trl]`."""

from __future__ import annotations

import warnings

from moelora.training.trainer import MoeLoraTrainerMixin

with warnings.catch_warnings():
    # TRL says at the import that the place may change; the docstring below says it too
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
    from trl.experimental.orpo import ORPOTrainer


class MoeLoraORPOTrainer(MoeLoraTrainerMixin, ORPOTrainer):
    """TRL's ORPO (https://huggingface.co/papers/2403.07691) with the balance losses; see `MoeLoraTrainerMixin`.

    TRL keeps it in `trl.experimental`, and may change or drop it.

    Args:
        router_training: See `MoeLoraTrainerMixin`. The other arguments are those of `ORPOTrainer`.
    """
