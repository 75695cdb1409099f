"""The supervised fine-tuning trainer of TRL with the balance losses; needs the extra `moelora[trl]`."""

from __future__ import annotations

from trl import SFTTrainer

from moelora.training.trainer import MoeLoraTrainerMixin


class MoeLoraSFTTrainer(MoeLoraTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with the balance losses of a moelora adapter; see `MoeLoraTrainerMixin`.

    Args:
        router_training: See `MoeLoraTrainerMixin`. The other arguments are those of `trl.SFTTrainer`.
    """
