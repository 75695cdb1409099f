"""Trainers that add the balance losses to whatever loss the trainer has.

The rules of scaling (rule 4 of the design): the losses are taken over all valid tokens of one optimizer step. Every
micro-batch and process adds its share of them, so value and gradient do not depend on how the step was cut.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import TransformersKwargs

from moelora.balance.totals import RoutingTotals, world_size
from moelora.config import BalanceScope, MoeLoraConfig
from moelora.errors import ConfigError
from moelora.forward import base_of, without_logits
from moelora.routing.batch import FACTS
from moelora.routing.record import Mixture
from moelora.routing.run import RunHooks, batch_facts, find_hooks, known_facts
from moelora.routing.stack import stack_records
from moelora.training.columns import FactColumns
from moelora.training.consistency import compare_forwards, labels_of
from moelora.training.finite import check_gradient, check_loss, check_weights
from moelora.training.metrics import RoutingMetrics
from moelora.training.micro_batch import MicroBatchBalance, active_config
from moelora.training.router_training import RouterTraining, router_rate
from moelora.training.sharding import prepare_sharding, refuse_zero_3

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)


class MoeLoraTrainerMixin(_Base):
    """Adds the balance losses of a moelora adapter to a transformers or TRL trainer, and logs them.

    Use `MoeLoraTrainer` or `MoeLoraSFTTrainer`, or put it first: `class MyTrainer(MoeLoraTrainerMixin, DPOTrainer)`.
    The losses and their coefficients are those of the adapter's `balance`. They are never in the evaluation loss. The
    log gets `balance_loss` and `z_loss` (without coefficients) and a summary of the experts' load; the load of each
    layer goes to `trainer.state.log_history`, and so to `trainer_state.json`.

    With `balance_scope="global"` and gradient accumulation each micro-batch is run once more without gradients at the
    start of a step, since the load of the whole step must be known before the first backward pass. Trainers whose
    batches are not inputs of the model (ORPO, CPO, GRPO) cannot count it so; a warning says that each micro-batch is
    then balanced alone.

    A loss that compares what two forwards predict ("consistency") costs two more forwards with gradients for each
    micro-batch, beside the trainer's own; the log gets `consistency_loss`, normalised over labels as the trainer's is.

    Columns `task_ids` and `instance_embedding` of the data are kept and given to the routing.

    A loss, a gradient or a weight that is NaN or infinite stops the training before anything is saved of it.

    Args:
        router_training: What is different in training for routers, such as their learning rate; their rate is then
            logged as `router_learning_rate`. None treats them as all else. The other arguments are the trainer's.

    Raises:
        ConfigError: If the trainer would wrap the model in `DataParallel`, generate with vLLM, or train under FSDP what
            FSDP cannot shard, or anything under DeepSpeed's ZeRO-3.
    """

    data_collator: Any
    _signature_columns: list[str] | None
    _moelora_batches: list[dict[str, Any]] | None = None
    _moelora_batch_of_step = 0
    _moelora_totals: RoutingTotals | None = None
    _moelora_micro_batch: MicroBatchBalance | None = None
    _moelora_metrics: RoutingMetrics | None = None
    _moelora_scope: BalanceScope | None = None
    _moelora_warned = False
    _moelora_router_rate: float | None = None

    def __init__(self, *args: Any, router_training: RouterTraining | None = None, **kwargs: Any) -> None:
        self.router_training = router_training
        # before the trainer starts an engine
        _refuse_vllm(inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments)
        super().__init__(*args, **kwargs)
        self.data_collator = FactColumns(self.data_collator)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"the trainer would run the model in DataParallel on {self.args.n_gpu} GPUs, which copies it at each "
                "forward; allowed: one process per GPU (torchrun --nproc_per_node), or one GPU "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        hooks = find_hooks(self.model)
        if hooks is not None:
            refuse_zero_3()
            if self.is_fsdp_enabled:
                prepare_sharding(self.model, hooks)

    def _set_signature_columns_if_needed(self) -> None:
        """Columns to keep: those of the trainer, and the facts of a batch."""
        super()._set_signature_columns_if_needed()
        kept = self._signature_columns or []
        self._signature_columns = [*kept, *(name for name in FACTS if name not in kept)]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The trainer's optimizer, or the one that it was given, with `router_training`; see `Trainer`.

        Raises:
            ConfigError: If there is `router_training`, and the trainer was given a scheduler that was made before.
        """
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.router_training is not None:
            if self.lr_scheduler is not None and router_rate(optimizer) is None:
                raise ConfigError(
                    "router_training moves the routers into groups of their own, and the trainer was given a scheduler "
                    "that was made before; allowed: optimizers=(optimizer, None)."
                )
            self.router_training.split(optimizer, self.model if model is None else model)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's scheduler, with `router_training`; see `Trainer`."""
        scheduler = super().create_scheduler(*args, **kwargs)
        if self.router_training is not None:
            self.router_training.schedule(scheduler)
        return scheduler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Note the micro-batches of the coming optimizer step; see `Trainer.get_batch_samples`."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._moelora_batches = batches
        self._moelora_batch_of_step = 0
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, with its routing recorded; see `Trainer.training_step`.

        Raises:
            TrainingError: If its loss is NaN or infinite.
        """
        loss = self._moelora_training_step(model, inputs, *args, **kwargs)
        self._moelora_batch_of_step += 1
        check_loss(loss, self.state.global_step + 1, self._moelora_batch_of_step, inputs, self.processing_class)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if not self.args.fp16:  # there the scaler skips steps whose gradients are infinite
            check_gradient(norm, self.state.global_step + 1)
        return norm

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # PEFT gives an adapter in half precision float32 when it reads one
        before = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != before[name]:
                parameter.data = parameter.data.to(before[name])

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save what is finite; see `Trainer.save_model`, which writes checkpoints too.

        Raises:
            TrainingError: If a trained weight is NaN or infinite; nothing is written.
        """
        check_weights(self.accelerator.unwrap_model(self.model), self.state.global_step)
        super().save_model(*args, **kwargs)

    def _moelora_training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.router_training is not None:
            self._moelora_router_rate = router_rate(self.optimizer)
        hooks = find_hooks(self.model)
        config = None if hooks is None else active_config(self.model)
        if hooks is None or config is None:
            return super().training_step(model, inputs, *args, **kwargs)
        self._moelora_set_progress(hooks)
        mixtures = hooks.mixtures()
        # an expert of another task is not dead
        measured = {} if config.selection.is_by_sequence else mixtures
        if self._moelora_metrics is None or self._moelora_metrics.mixtures != measured:
            self._moelora_metrics = RoutingMetrics(measured, self.args.device)
            self._require_input_grads()
        batches, self._moelora_batches = self._moelora_batches, None
        if batches is not None:
            self._moelora_totals = self._count_step(model, batches, hooks, config, mixtures)
        with hooks.listening(gradients_only=True) as listener:
            micro_batch = MicroBatchBalance(
                listener,
                config.balance,
                self._moelora_scope or config.balance_scope,
                mixtures,
                getattr(self, "current_gradient_accumulation_steps", 1),
                self._moelora_totals,
                hooks.layers,
            )
            self._moelora_micro_batch = micro_batch
            try:
                loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
            finally:
                self._moelora_micro_batch = None
        micro_batch.check_attached()
        if micro_batch.adds_any and not micro_batch.is_added and not self._moelora_warned:
            self._moelora_warned = True
            logger.warning(
                f"{type(self).__name__} has a compute_loss of its own that does not call this mixin's, so no balance "
                "loss is added and nothing is logged of the routing. Call super().compute_loss, or add "
                "moelora.balance_losses yourself."
            )
        return loss

    def _moelora_set_progress(self, hooks: RunHooks) -> None:
        """Tell the routers how much of the training is done, before every step: a resumed run goes on where it was."""
        share = self.state.global_step / max(1, self.state.max_steps - 1)
        for layer in hooks.layers:
            for _, adapter in layer.mixtures():
                layer.routers[adapter].set_progress(share)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss plus, in training, this micro-batch's share of the balance losses."""
        inputs, facts = _without_facts(inputs)
        micro_batch = self._moelora_micro_batch
        comparing = micro_batch is not None and bool(micro_batch.comparing)
        labels = labels_of(inputs, type(self).__name__) if comparing else None
        with facts, self._moelora_prompts(inputs):
            # trainers change the batch that they are given
            result = super().compute_loss(model, {**inputs} if comparing else inputs, *args, **kwargs)
            if micro_batch is None:
                return result
            loss, *rest = result if isinstance(result, tuple) else (result,)
            items = kwargs.get("num_items_in_batch")
            loss = micro_batch.add_to(loss, divided_later=not self._moelora_loss_is_scaled(items))
            if labels is not None:
                loss = self._moelora_compare(model, inputs, labels, micro_batch, loss, items)
        assert self._moelora_metrics is not None
        self._moelora_metrics.add(micro_batch)
        self._warn_if_nothing_was_recorded(micro_batch)
        return (loss, *rest) if isinstance(result, tuple) else loss

    def _moelora_compare(
        self, model: nn.Module, inputs: Any, labels: Tensor, micro_batch: MicroBatchBalance, loss: Tensor, items: Any
    ) -> Tensor:
        """The loss with that of two more forwards of the batch, which are to predict alike."""
        sums, count = compare_forwards(
            model, self._moelora_base(), self._model_inputs(inputs), labels, micro_batch.comparing
        )
        scaled = self._moelora_loss_is_scaled(items)
        of_step = scaled and items is not None
        if of_step and not self.args.average_tokens_across_devices:
            items = items * world_size()  # each process has counted its own
        return micro_batch.add_compared(
            loss, sums, items if of_step else count, divided_later=not scaled, of_step=of_step
        )

    def _moelora_prompts(self, inputs: Any) -> AbstractContextManager[None]:
        """What routing by sequence has to know of prompts, found here since a loss may hide labels from the model."""
        hooks = find_hooks(self.model)
        if hooks is None or not isinstance(inputs, Mapping) or not {"input_ids", "inputs_embeds"} & set(inputs):
            return nullcontext()
        base = next(module for module, name in hooks.names.items() if not name)
        return known_facts(hooks.facts_of_prompts(base, inputs))

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.prediction_step`."""
        inputs, facts = _without_facts(inputs)
        with facts:
            return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the balance losses and the experts' load since the last log; see `Trainer.log`."""
        metrics = self._moelora_metrics
        if "loss" in logs and self._moelora_router_rate is not None:
            logs["router_learning_rate"] = self._moelora_router_rate
        if "loss" not in logs or metrics is None or metrics.empty or not metrics.mixtures:
            super().log(logs, *args, **kwargs)
            return
        summary, layers = metrics.pop()
        logs.update(summary)
        super().log(logs, *args, **kwargs)
        # Only the history: a line with three numbers for each layer would drown the loss on the screen.
        self.state.log_history[-1].update(layers)

    def _warn_if_nothing_was_recorded(self, micro_batch: MicroBatchBalance) -> None:
        if micro_batch.balance and not micro_batch.records and not self._moelora_warned:
            self._moelora_warned = True
            logger.warning(
                "No mixture ran in a forward of the model, so a micro-batch has no balance loss. That is right where "
                "the adapted part of a model runs for some rows only (a vision tower), and wrong where the trainer "
                "calls layers of the model by themselves."
            )

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

    def _count_step(
        self,
        model: nn.Module,
        batches: list[Any],
        hooks: RunHooks,
        config: MoeLoraConfig,
        mixtures: Mapping[Mixture, int],
    ) -> RoutingTotals | None:
        """Totals over the micro-batches of a step, or None where each micro-batch or a single one is balanced alone."""
        scope = self._moelora_scope or config.balance_scope
        counted = any(choice.has_loss and choice.reads == "routing" for choice in config.balance)
        if not counted or scope != "global" or len(batches) < 2:
            return None
        if all(isinstance(batch, Mapping) and {"input_ids", "inputs_embeds"} & set(batch) for batch in batches):
            return self._count(model, batches, hooks, mixtures, any(choice.needs_sums for choice in config.balance))
        self._moelora_scope = "micro_batch"
        logger.warning(
            f"balance_scope is 'global' and {type(self).__name__} accumulates gradients over batches that are not "
            "inputs of the model, so the load of a step cannot be counted beforehand: each micro-batch is balanced "
            "alone, as with balance_scope='micro_batch'."
        )
        return None

    @torch.no_grad()
    def _count(
        self, model: nn.Module, batches: list[Any], hooks: RunHooks, mixtures: Mapping[Mixture, int], sums: bool
    ) -> RoutingTotals:
        """Totals over the micro-batches of a step and all processes, found by running them without gradients.

        The random state is put back afterwards, so the training forwards draw the same dropout masks as these.
        """
        model.train()
        totals = RoutingTotals.of([], mixtures, sums=sums)
        devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices), hooks.listening() as listener, warnings.catch_warnings():
            # reentrant checkpointing warns of what is meant here
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            for batch in batches:
                listener.clear()
                inputs, facts = _without_facts(self._prepare_inputs(batch))
                with facts:
                    # nobody reads the logits of this forward
                    model(**self._model_inputs(inputs), **without_logits(self._moelora_base(), self.args.device))
                totals = totals + RoutingTotals.of(stack_records(listener.records), mixtures, sums=sums)
        return totals.all_reduce(self.args.device)

    def _moelora_base(self) -> Any:
        """The model below all wrappers."""
        return base_of(self.accelerator.unwrap_model(self.model))

    def _model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model needs of a batch to run: its inputs, without labels unless the decoder reads them."""
        base = self._moelora_base()
        parameters = inspect.signature(type(base).forward).parameters
        accepted = set(parameters)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            accepted |= set(TransformersKwargs.__annotations__)
        accepted -= {"num_items_in_batch"} if base.config.is_encoder_decoder else {"num_items_in_batch", "labels"}
        inputs = {key: value for key, value in batch.items() if key in accepted}
        # nobody reads the cache of this forward
        return {**inputs, "use_cache": False} if "use_cache" in parameters else inputs


def _refuse_vllm(given: Mapping[str, Any]) -> None:
    """Refuse generation by vLLM of a model with an adapter of ours; a plain LoRA may use it."""
    model, config = given.get("model"), given.get("peft_config")
    ours = isinstance(config, MoeLoraConfig) or (isinstance(model, nn.Module) and find_hooks(model) is not None)
    if ours and getattr(given.get("args"), "use_vllm", False):
        raise ConfigError(
            "use_vllm is True; allowed: False. vLLM is given the weights with the adapter merged into them, and a "
            "routed mixture cannot be merged, since it depends on its input. Without vLLM transformers generates."
        )


def _without_facts(inputs: Any) -> tuple[Any, AbstractContextManager[None]]:
    """A batch without the facts in it, and the context that gives them to the routing."""
    if not isinstance(inputs, Mapping) or not set(FACTS) & set(inputs):
        return inputs, nullcontext()
    facts = {name: inputs[name] for name in FACTS if name in inputs}
    return {key: value for key, value in inputs.items() if key not in facts}, batch_facts(**facts)


class MoeLoraTrainer(MoeLoraTrainerMixin, Trainer):
    """`transformers.Trainer` with the balance losses of a moelora adapter; see `MoeLoraTrainerMixin`.

    Args:
        router_training: See `MoeLoraTrainerMixin`. The other arguments are those of `transformers.Trainer`.
    """


class MoeLoraSeq2SeqTrainer(MoeLoraTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with the balance losses of a moelora adapter; see `MoeLoraTrainerMixin`.

    Args:
        router_training: See `MoeLoraTrainerMixin`. The other arguments are those of `transformers.Seq2SeqTrainer`.
    """
