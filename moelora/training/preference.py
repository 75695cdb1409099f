"""TRL's trainers on pairs and on rated answers with the balance losses; they need the extra `moelora[trl]`."""

from __future__ import annotations

from trl import DPOTrainer, KTOTrainer, RewardTrainer

from moelora.training.trainer import MoeLoraTrainerMixin


class MoeLoraDPOTrainer(MoeLoraTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` (https://huggingface.co/papers/2305.18290) with the balance losses; see `MoeLoraTrainerMixin`.

    The forward of the reference is not balanced.

    Args:
        router_training: See `MoeLoraTrainerMixin`. The other arguments are those of `trl.DPOTrainer`.
    """


class MoeLoraKTOTrainer(MoeLoraTrainerMixin, KTOTrainer):
    """`trl.KTOTrainer` (https://huggingface.co/papers/2402.01306) with the balance losses; see `MoeLoraTrainerMixin`.

    The forwards of the reference, and those that estimate the KL divergence, are not balanced.

    Args:
        router_training: See `MoeLoraTrainerMixin`. The other arguments are those of `trl.KTOTrainer`.
    """


class MoeLoraRewardTrainer(MoeLoraTrainerMixin, RewardTrainer):
    """`trl.RewardTrainer` with the balance losses; see `MoeLoraTrainerMixin`.

    Args:
        router_training: See `MoeLoraTrainerMixin`. The other arguments are those of `trl.RewardTrainer`.
    """
