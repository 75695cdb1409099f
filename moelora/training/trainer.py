"""Trainers that add the balance losses to whatever loss the trainer has.

The rules of scaling (rule 4 of the design): the losses are taken over all valid tokens of one optimizer step. Every
micro-batch and process adds its share of them, so value and gradient do not depend on how the step was cut.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import TransformersKwargs

from moelora.errors import ConfigError
from moelora.losses import RoutingTotals
from moelora.routing.recorder import RoutingRecorder, find_recorder
from moelora.training.balance import MicroBatchBalance, active_balance, world_size
from moelora.training.metrics import RoutingMetrics

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class MoeLoraTrainerMixin(_Base):
    """Adds the balance loss and the z-loss of a moelora adapter to a transformers or TRL trainer, and logs them.

    Use `MoeLoraTrainer` or `MoeLoraSFTTrainer`, or put it first: `class MyTrainer(MoeLoraTrainerMixin, DPOTrainer)`.
    The losses and their coefficients are those of the adapter's `balance` (`moelora.BalanceConfig`). They are never in
    the evaluation loss. The log gets `balance_loss` and `z_loss` (without coefficients) and a summary of the experts'
    load; the load of each layer goes to `trainer.state.log_history`, and so to `trainer_state.json`.

    With `balance.scope="global"` and gradient accumulation each micro-batch is run once more without gradients at the
    start of a step, since the load of the whole step must be known before the first backward pass.

    Raises:
        ConfigError: At the first step, with `balance.scope="global"` and gradient accumulation, if the trainer's
            batches are not inputs of the model (some reinforcement-learning trainers), so that they cannot be counted.
    """

    _moelora_adapters: set[str]
    _moelora_batches: list[dict[str, Any]] | None = None
    _moelora_totals: RoutingTotals | None = None
    _moelora_micro_batch: MicroBatchBalance | None = None
    _moelora_metrics: RoutingMetrics | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        self._moelora_adapters = set(getattr(model, "peft_config", {}))
        super().__init__(*args, **kwargs)
        self._moelora_complete_reference()

    def _moelora_complete_reference(self) -> None:
        """Copy frozen routers and biases to the adapter "ref" that TRL adds as the reference of an adapter.

        TRL copies parameters only, and these are buffers.
        """
        if "ref" in self._moelora_adapters or "ref" not in getattr(self.model, "peft_config", {}):
            return
        buffers = dict(self.model.named_buffers())
        for name, buffer in buffers.items():
            if ".moelora_router.default." in name:
                buffers[name.replace(".default.", ".ref.")].copy_(buffer)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's DPO trainer may run the reference while it is being made."""
        self._moelora_complete_reference()
        return super()._precompute_ref_logps(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Note the micro-batches of the coming optimizer step; see `Trainer.get_batch_samples`."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._moelora_batches = batches
        return batches, num_items

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, with its routing recorded; see `Trainer.training_step`."""
        recorder = find_recorder(self.model)
        if recorder is None:
            return super().training_step(model, *args, **kwargs)
        if self._moelora_metrics is None:
            self._moelora_metrics = RoutingMetrics()
            self._require_input_grads()
        config = active_balance(self.model)
        batches, self._moelora_batches = self._moelora_batches, None
        if batches is not None:
            counted = config.enabled and config.scope == "global" and len(batches) > 1
            self._moelora_totals = self._count_step(model, batches, recorder) if counted else None
        accumulation = getattr(self, "current_gradient_accumulation_steps", 1)
        with recorder.listening(gradients_only=True) as listener:
            self._moelora_micro_batch = MicroBatchBalance(
                recorder, listener, config, accumulation, self._moelora_totals
            )
            try:
                return super().training_step(model, *args, **kwargs)
            finally:
                self._moelora_micro_batch = None
                recorder.disarm()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss plus, in training, this micro-batch's share of the balance losses."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        micro_batch = self._moelora_micro_batch
        if micro_batch is None:
            return result
        assert self._moelora_metrics is not None
        loss, *rest = result if isinstance(result, tuple) else (result,)
        divided_later = not self._moelora_loss_is_scaled(kwargs.get("num_items_in_batch"))
        loss = micro_batch.add_to(loss, divided_later=divided_later)
        self._moelora_metrics.add(micro_batch)
        return (loss, *rest) if isinstance(result, tuple) else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the balance losses and the experts' load since the last log; see `Trainer.log`."""
        metrics = self._moelora_metrics
        if "loss" not in logs or metrics is None or metrics.empty:
            super().log(logs, *args, **kwargs)
            return
        summary, layers = metrics.pop()
        logs.update(summary)
        super().log(logs, *args, **kwargs)
        # Only the history: a line with three numbers for each layer would drown the loss on the screen.
        self.state.log_history[-1].update(layers)

    def _moelora_loss_is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the trainer takes the loss as normalised over the accumulated batch; mirrors `training_step`."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return bool(self.loss_is_scaled_for_ga)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or self.compute_loss_func is not None)

    def _require_input_grads(self) -> None:
        """Reentrant checkpointing of a frozen first layer gives no gradients at all unless its input asks for them."""
        kwargs = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and kwargs.get("use_reentrant"):
            self.model.enable_input_require_grads()

    @torch.no_grad()
    def _count_step(self, model: nn.Module, batches: list[Any], recorder: RoutingRecorder) -> RoutingTotals:
        """Totals over the micro-batches of a step and all processes, found by running them without gradients.

        The random state is put back afterwards, so the training forwards draw the same dropout masks as these.
        """
        model.train()
        totals: RoutingTotals | None = None
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            recorder.listening(frozen=True) as listener,
            warnings.catch_warnings(),
        ):
            # reentrant checkpointing warns of what is meant here
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            for batch in batches:
                listener.clear()
                model(**self._prepare_inputs(self._counting_inputs(batch)))
                found = RoutingTotals.of(listener.records)
                totals = found if totals is None else totals + found
        assert totals is not None
        return totals.all_reduce() if world_size() > 1 else totals

    def _counting_inputs(self, batch: Any) -> dict[str, Any]:
        """What the model needs of a batch to route it: its inputs, without labels unless the decoder reads them."""
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(batch, Mapping) or not {"input_ids", "inputs_embeds"} & set(batch):
            raise ConfigError(
                f"balance.scope is 'global' and {type(self).__name__} accumulates gradients over batches that are not "
                "inputs of the model, so the load of a step cannot be counted beforehand; allowed: 'micro_batch'. Set "
                "balance_scope='micro_batch' in the preset."
            )
        parameters = inspect.signature(base.forward).parameters
        accepted = set(parameters)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            accepted |= set(TransformersKwargs.__annotations__)
        accepted -= {"num_items_in_batch"} if base.config.is_encoder_decoder else {"num_items_in_batch", "labels"}
        inputs = {key: value for key, value in batch.items() if key in accepted}
        # Nobody reads the logits or the cache of this forward. The number 1 would stand for a slice, and on the CPU
        # torch multiplies each row of a slice by its own copy of the head: longer than the rest of the forward.
        first = torch.zeros(1, dtype=torch.long, device=self.args.device)
        unread = {"use_cache": False, "logits_to_keep": first}
        return inputs | {key: value for key, value in unread.items() if key in parameters}


class MoeLoraTrainer(MoeLoraTrainerMixin, Trainer):
    """`transformers.Trainer` with the balance losses of a moelora adapter; see `MoeLoraTrainerMixin`."""
