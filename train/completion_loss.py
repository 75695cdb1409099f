"""TRL's supervised fine-tuning trainer without the logits that no label asks for.

TRL computes the logits of every position unless Triton runs, and most of a prompt-completion row is prompt: with
answers of a few tokens and SmolLM2's vocabulary of 49,152 that is nearly half of a training step on CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trl import SFTTrainer

from moelora.forward import takes_logits_to_keep


class CompletionLossTrainer(SFTTrainer):
    """`trl.SFTTrainer` whose training loss computes the logits of labelled positions only, where the model can.

    The loss is TRL's: the negative log-likelihood, summed over the labels and divided by their number in the optimizer
    step. Anything else (other losses, label smoothing, evaluation, Triton, models without `logits_to_keep`) is left to
    TRL.
    """

    _correct: Tensor | None = None
    _labels = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; see `Trainer.compute_loss`."""
        if return_outputs or not model.training or not self._is_plain(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        targets = inputs.pop("labels")[:, 1:]
        kept = (targets != -100).any(dim=0).nonzero().squeeze(-1)
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
        targets = targets[:, kept]
        valid = targets != -100
        logits, targets = logits[valid].float(), targets[valid]
        total = F.cross_entropy(logits, targets, reduction="sum")
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        correct = (logits.detach().argmax(-1) == targets).sum()
        self._correct = correct if self._correct is None else self._correct + correct
        self._labels += len(targets)
        return loss

    def _is_plain(self, inputs: dict[str, Any]) -> bool:
        """Whether the batch and the arguments ask for the ordinary loss of a causal language model."""
        return (
            self.args.device.type == "cpu"
            and self.args.loss_type == "nll"
            and self.args.label_smoothing_factor == 0
            and self.compute_loss_func is None
            and not self.aux_loss_enabled
            and inputs.get("labels") is not None
            and takes_logits_to_keep(self.accelerator.unwrap_model(self.model))
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the share of labels that were the likeliest token since the last log; see `Trainer.log`."""
        if "loss" in logs and self._correct is not None:
            sums = torch.stack([self._correct, torch.as_tensor(self._labels, device=self._correct.device)])
            correct, labels = self.accelerator.reduce(sums).tolist()
            logs = {**logs, "token_accuracy": correct / max(labels, 1)}
            self._correct, self._labels = None, 0
        super().log(logs, *args, **kwargs)
