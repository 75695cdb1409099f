"""Supervised fine-tuning: train an adapter, and the plain LoRA to compare it with if the run asks for one."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import get_peft_model
from transformers import ProgressCallback, TrainerState, set_seed

from moelora import MoeLoraConfig, MoeLoraTrainerMixin
from moelora.errors import MoeLoraError, RunError
from moelora.files import new_folder
from moelora.runs.config import RunConfig, adapter_config, training_config
from moelora.runs.console import IS_MAIN, say
from moelora.runs.data import load_rows, with_task_ids
from moelora.runs.folder import ADAPTER, BASELINE, RunDir
from moelora.runs.models import load_adapter, load_model, load_tokenizer
from moelora.runs.precision import say_if_slow
from moelora.runs.progress import LiveProgress
from moelora.runs.recipes import RECIPES
from moelora.runs.stopping import SaveAndStop
from moelora.runs.wording import minutes, one_line
from moelora.training.centroids import fit_unfitted
from moelora.training.finite import check_weights
from train.baseline import baseline_config
from train.completion_loss import CompletionLossTrainer


class RunTrainer(MoeLoraTrainerMixin, CompletionLossTrainer):
    """Adds the balance losses of a mixture; for a plain LoRA it is TRL's trainer."""


def run(
    config: RunConfig,
    *,
    restart: bool = False,
    trainer_class: Callable[..., Any] = RunTrainer,
    model_words: Callable[[Any, Any], dict[str, Any]] | None = None,
) -> None:
    """Train what `config` says into `config.output_dir`, from the last checkpoint of an earlier call if there is one.

    Args:
        config: The run.
        restart: Throw away what an earlier call has trained.
        trainer_class: Makes the trainer; recipes differ in it.
        model_words: Arguments of the base model's `from_pretrained` that depend on the rows and the tokenizer.

    Raises:
        RunError: If the run cannot start or be resumed.
    """
    folder = RunDir(config.output_dir)
    with folder.opened(config, restart=restart) if IS_MAIN else nullcontext():
        tokenizer = load_tokenizer(config)
        rows = load_rows(config.dataset, tokenizer, config.recipe)
        if IS_MAIN:
            folder.check_rows(rows)
        show_rows(rows, config)
        more = {} if model_words is None else model_words(rows, tokenizer)
        # Both are made before the first is trained: a rank that cannot match is no news for the end of a long run.
        adapter = adapter_config(config)
        if reads_tasks(adapter):
            rows = with_task_ids(rows, config.dataset)
        stages = {ADAPTER: (adapter, dict[str, Any]())}
        if config.baseline is not None:
            stages[BASELINE] = (baseline_config(config, config.baseline, adapter), config.baseline.training)
        for stage, (peft_config, changes) in stages.items():
            args = training_config(config, folder.checkpoints(stage), changes)
            words = {"router_training": config.router_training} if stage == ADAPTER else {}
            trainer = partial(trainer_class, **words)
            make_model = partial(_make_model, config, peft_config, more)
            train_stage(stage, make_model, args, folder, tokenizer, rows, trainer_class=trainer)
    say_done(config, folder)


def say_done(config: RunConfig, folder: RunDir) -> None:
    """Say where the run is, and the commands that go on from there."""
    root = folder.root
    if RECIPES[config.recipe].task_type != "CAUSAL_LM":
        say(f"\nDone: {root}\nNext: moelora report {root}")
        return
    has_own = config.dataset.tasks or config.dataset.held_out
    scored = f"moelora eval {root}{'' if has_own else ' --suite commonsense'}"
    say(f"\nDone: {root}\nNext: {scored}\n      moelora chat {root}\n      moelora report {root}")


def reads_tasks(adapter: MoeLoraConfig) -> bool:
    """Whether its routing has a table of tasks, or its balance goes by the task."""
    return hasattr(adapter.scores, "num_tasks") or any("task_ids" in choice.needs for choice in adapter.balance)


def _make_model(config: RunConfig, peft_config: Any, more: dict[str, Any]) -> Any:
    path = config.adapter.get("path")
    base = load_model(config, RECIPES[config.recipe].task_type, more)
    if path is None or not isinstance(peft_config, MoeLoraConfig):
        return new_adapter(base, peft_config, config.adapter_dtype)
    model = load_adapter(base, str(Path(path).expanduser()), is_trainable=True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RunError(
            f"adapter.path {path!r} has nothing to train: its experts are frozen and its router is not trained; "
            "allowed: a composition with router topk, or one made with --trainable."
        )
    return model


def show_rows(rows: Any, config: RunConfig) -> None:
    """Print what a run is trained on."""
    say(f"Model     {config.model} in {config.dtype}")
    say_if_slow(config.dtype)
    tasks = Counter(rows["task"]) if "task" in rows.column_names else {}
    say(f"Rows      {len(rows)}" + (f": {', '.join(f'{t} {n}' for t, n in sorted(tasks.items()))}" if tasks else ""))
    row = {key: value for key, value in rows[0].items() if key != "task"}
    say(f"A row     {json.dumps(row, ensure_ascii=False)[:400]}")


def new_adapter(base: Any, peft_config: Any, adapter_dtype: str = "auto") -> Any:
    """A base model with a new adapter.

    Args:
        base: The base model; it is changed.
        peft_config: The adapter.
        adapter_dtype: As in `RunConfig`.
    """
    model = get_peft_model(base, peft_config, autocast_adapter_dtype=adapter_dtype not in ("base", "bfloat16"))
    return set_dtype(model, adapter_dtype)


def set_dtype(model: Any, adapter_dtype: str) -> Any:
    """Give what is trained its data type; the model."""
    if adapter_dtype not in ("auto", "base"):
        # PEFT knows float32 and the base's own data type; with a base in float32 it would leave bfloat16 undone
        dtype = getattr(torch, adapter_dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return model


def make_trainer(
    model: Any, args: Any, rows: Any, tokenizer: Any, trainer_class: Callable[..., Any] = RunTrainer
) -> Any:
    """A trainer of a model's adapter, without a progress display.

    Raises:
        MoeLoraError: If the trainer refuses the arguments or the model, or no row is short enough to be trained on.
    """
    try:
        trainer = trainer_class(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    except ValueError as error:
        raise error if isinstance(error, MoeLoraError) else RunError(f"training: {one_line(error)}") from error
    if len(trainer.train_dataset) == 0:
        raise RunError(
            f"training.max_length is {args.max_length}, and the prompt of every row is at least as long, so that no "
            "completion is left to train on; allowed: more tokens than the longest prompts have."
        )
    trainer.remove_callback(ProgressCallback)
    return trainer


def train_stage(
    stage: str,
    make_model: Callable[[], Any],
    args: Any,
    folder: RunDir,
    tokenizer: Any,
    rows: Any,
    *,
    label: str | None = None,
    trainer_class: Callable[..., Any] = RunTrainer,
) -> None:
    """Train one adapter into a run's folder, from its last checkpoint if there is one, unless it is trained already.

    SIGTERM and SIGHUP end it with a checkpoint after the step under way.

    Args:
        stage: Its name in the folder.
        make_model: Makes the base model with the adapter to train; called once the seed is set.
        args: The trainer's arguments.
        folder: The run's folder.
        tokenizer: The base's tokenizer.
        rows: The training rows.
        label: What messages call it; None for the stage's name.
        trainer_class: Makes the trainer.

    Raises:
        RunError: If a checkpoint cannot be read, or FSDP is on.
        TrainingError: If training diverges; what was saved before stays.
    """
    label = label or stage
    if folder.is_finished(stage):
        say(f"\nThe {label} is trained already: {folder.stage(stage)} (--restart trains it again)")
        return
    set_seed(args.seed)
    model = make_model()
    peft_config = model.peft_config[model.active_adapter]
    # before the trainer adds a copy as its reference
    trainable, total = model.get_nb_trainable_parameters()
    trainer = make_trainer(model, args, rows, tokenizer, trainer_class)
    if trainer.is_fsdp_enabled:
        raise RunError(
            "FSDP is on (training.fsdp, or --use_fsdp of accelerate), and this program saves an adapter from one "
            "process, which then has shards; allowed: data parallelism (torchrun), or moelora's trainers in a program "
            "of your own."
        )
    fit_unfitted(model, trainer.train_dataset)
    experts = getattr(peft_config, "experts", None)
    name = getattr(peft_config, "preset", None) or (f"{experts.num_experts} experts" if experts else "plain LoRA")
    say(f"\nTraining  {label}: {name}, {trainable:,} trainable parameters ({trainable / total:.1%})")
    trainer.add_callback(LiveProgress(label))
    checkpoint = folder.last_checkpoint(stage)
    if checkpoint is not None:
        say(f"Resuming  from {checkpoint}")
    stop = SaveAndStop()
    trainer.add_callback(stop)
    started = time.monotonic()
    try:
        with stop.listening(trainer.accelerator.num_processes):
            if checkpoint is not None and folder.is_last(checkpoint):
                _resume_finished(trainer, checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except UnpicklingError as error:
        raise RunError(
            f"{str(checkpoint)!r} cannot be resumed from: {one_line(error)[:200]} Its files are read as tensors alone; "
            "allowed: as they were saved. Remove this checkpoint, or give --restart."
        ) from error
    seconds = time.monotonic() - started
    check_weights(model, trainer.state.global_step)
    if trainer.is_world_process_zero():
        earlier = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        record = {
            "preset": getattr(peft_config, "preset", None),
            "trainable_parameters": trainable,
            "base_parameters": total - trainable,
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 1),
            # Of a run that was stopped, only the last part is timed.
            "timed_steps": trainer.state.global_step - earlier,
            "resumed_from": checkpoint.name if checkpoint else None,
            **_classes(model),
            "log": [_compact(entry) for entry in trainer.state.log_history if "loss" in entry],
        }
        _save(model, tokenizer, record, folder.stage(stage))
        say(f"Saved     {folder.stage(stage)} after {minutes(seconds)}")


def _resume_finished(trainer: Any, checkpoint: Path) -> None:
    """Take weights and state of a checkpoint after which there is nothing left to train.

    `train` would make one more step. The optimizer is not read.
    """
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer._load_from_checkpoint(str(checkpoint))


def _classes(model: Any) -> dict[str, list[str]]:
    """The names of a classifier's classes in their order, which its adapter does not hold."""
    count = getattr(model.config, "num_labels", 0)
    is_classifier = model.active_peft_config.task_type == "SEQ_CLS" and count > 1
    return {"classes": [model.config.id2label[number] for number in range(count)]} if is_classifier else {}


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """A log without its lines for each layer, which stay in the checkpoint's trainer_state.json."""
    return {key: value for key, value in entry.items() if not (key.startswith("expert_load/") and key.count("/") > 1)}


def _save(model: Any, tokenizer: Any, record: dict[str, Any], folder: Path) -> None:
    """Write the finished adapter; the folder appears with everything in it, or not at all."""
    with new_folder(folder) as ready:
        # beside it there may be a trainer's reference, or an older adapter that is not trained
        model.save_pretrained(str(ready), selected_adapters=["default"])
        tokenizer.save_pretrained(str(ready))
        (ready / "training.json").write_text(json.dumps(record, indent=2) + "\n")
