"""moelora: routed mixtures of LoRA experts as a PEFT method.

Importing it registers the method, so that `peft.get_peft_model` and `PeftModel.from_pretrained` know it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moelora.runs.quiet import drop_kernel_notice

drop_kernel_notice()

# the packages of the axes register their choices
from moelora import balance, experts, presets, scores, selection  # noqa: F401
from moelora.balance.losses import balance_losses
from moelora.config import MoeLoraConfig
from moelora.errors import MoeLoraError
from moelora.inject import placement  # noqa: F401
from moelora.loading import loading, swappable_weights
from moelora.model import MoeLoraModel
from moelora.ops import compute  # noqa: F401
from moelora.peft_plugin import register
from moelora.routing.record import RoutingRecord
from moelora.routing.run import batch_facts, record_routing
from moelora.version import __version__

if TYPE_CHECKING:
    from moelora.share import push_to_hub
    from moelora.training.centroids import fit_centroids
    from moelora.training.grpo import MoeLoraGRPOTrainer
    from moelora.training.orpo import MoeLoraORPOTrainer
    from moelora.training.preference import MoeLoraDPOTrainer, MoeLoraKTOTrainer, MoeLoraRewardTrainer
    from moelora.training.router_training import RouterTraining
    from moelora.training.sft import MoeLoraSFTTrainer
    from moelora.training.trainer import MoeLoraSeq2SeqTrainer, MoeLoraTrainer, MoeLoraTrainerMixin

register(MoeLoraConfig, MoeLoraModel, loading, swappable_weights)

__all__ = [
    "MoeLoraConfig",
    "MoeLoraDPOTrainer",
    "MoeLoraError",
    "MoeLoraGRPOTrainer",
    "MoeLoraKTOTrainer",
    "MoeLoraModel",
    "MoeLoraORPOTrainer",
    "MoeLoraRewardTrainer",
    "MoeLoraSFTTrainer",
    "MoeLoraSeq2SeqTrainer",
    "MoeLoraTrainer",
    "MoeLoraTrainerMixin",
    "RouterTraining",
    "RoutingRecord",
    "__version__",
    "balance_losses",
    "batch_facts",
    "fit_centroids",
    "presets",
    "push_to_hub",
    "record_routing",
]

_LAZY = {
    "MoeLoraTrainerMixin": "moelora.training.trainer",
    "MoeLoraTrainer": "moelora.training.trainer",
    "MoeLoraSeq2SeqTrainer": "moelora.training.trainer",
    "MoeLoraSFTTrainer": "moelora.training.sft",
    "MoeLoraDPOTrainer": "moelora.training.preference",
    "MoeLoraKTOTrainer": "moelora.training.preference",
    "MoeLoraRewardTrainer": "moelora.training.preference",
    "MoeLoraORPOTrainer": "moelora.training.orpo",
    "MoeLoraGRPOTrainer": "moelora.training.grpo",
    "RouterTraining": "moelora.training.router_training",
    "push_to_hub": "moelora.share",
    "fit_centroids": "moelora.training.centroids",
}


def __getattr__(name: str) -> Any:
    """Import the trainers on first use: TRL is optional, and loading an adapter needs no trainer."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
