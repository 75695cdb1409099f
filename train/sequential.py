"""Tasks one after the other: each trains an expert of its own beside those of the tasks before it, which stay.

The adapter after each task is in `stages/`, the last of them in `adapter/` too. With a baseline, one plain LoRA of the
experts' total size is trained on the same tasks in the same order: what a mixture has to be better than. A run that was
stopped goes on with the task, and from the checkpoint, that it had come to.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from torch import Tensor

from moelora import MoeLoraConfig
from moelora.compose import add_experts, fit_centroid
from moelora.compose.editing import read_stacked
from moelora.compose.tokens import batches, tokenize, turn_start
from moelora.errors import RunError
from moelora.files import new_folder
from moelora.layers.base import MoeLoraLayer
from moelora.runs.config import BaselineConfig, RunConfig, SequentialConfig, adapter_config, training_config
from moelora.runs.console import IS_MAIN
from moelora.runs.data import load_rows
from moelora.runs.folder import ADAPTER, BASELINE, RunDir, task_stage
from moelora.runs.models import ModelSource, load_adapter, load_model, load_tokenizer
from train.baseline import baseline_config
from train.sft import new_adapter, say_done, show_rows, train_stage

# A mean embedding hardly moves with more rows than this.
CENTROID_ROWS = 256


def run(config: RunConfig, *, restart: bool = False) -> None:
    """Train what `config` says into `config.output_dir`, from where an earlier call was stopped.

    Args:
        config: The run.
        restart: Throw away what an earlier call has trained.

    Raises:
        RunError: If the run cannot start or be resumed.
    """
    words = config.sequential or SequentialConfig()
    order = _order(config, words)
    lora = adapter_config(config)
    first_config(lora, words, order[0])
    # made before anything is trained: a rank that cannot match is no news for the end of a long run
    one_lora = None if config.baseline is None else _baseline_config(config, config.baseline, lora, len(order))
    folder = RunDir(config.output_dir)
    with folder.opened(config, restart=restart) if IS_MAIN else nullcontext():
        tokenizer = load_tokenizer(config)
        rows = load_rows(config.dataset, tokenizer)
        if IS_MAIN:
            folder.check_rows(rows)
        show_rows(rows, config)
        of_task = _by_task(rows, order)
        source = ModelSource(config.model, config.dtype, config.model_kwargs)
        done = train_tasks(
            source,
            lora,
            words,
            of_task,
            folder,
            tokenizer,
            lambda stage: training_config(config, folder.checkpoints(stage)),
            config.adapter_dtype,
        )
        _finish(folder, ADAPTER, done)
        if config.baseline is not None:
            changes = config.baseline.training
            _finish(folder, BASELINE, _train_baseline(config, one_lora, changes, of_task, folder, tokenizer))
    say_done(config, folder)


def _train_baseline(
    config: RunConfig, lora: Any, changes: dict[str, Any], rows: dict[str, Any], folder: RunDir, tokenizer: Any
) -> list[Path]:
    """Train one LoRA on the tasks in turn; the folders of it after each of them."""
    done: list[Path] = []
    for index, (task, own) in enumerate(rows.items()):
        stage = task_stage(index + 1, task, BASELINE)

        def make_model(before: Path | None = done[-1] if done else None) -> Any:
            if before is None:
                return new_adapter(load_model(config), lora, config.adapter_dtype)
            return load_adapter(load_model(config), str(before), is_trainable=True)

        args = training_config(config, folder.checkpoints(stage), changes)
        train_stage(stage, make_model, args, folder, tokenizer, own, label=f"one LoRA on {task}")
        done.append(folder.stage(stage))
    return done


def _baseline_config(config: RunConfig, words: BaselineConfig, lora: MoeLoraConfig, tasks: int) -> Any:
    """The LoRA that is as large as all experts together."""
    experts = replace(lora.experts, r=tasks * lora.experts.r, lora_alpha=tasks * lora.experts.lora_alpha)
    return baseline_config(config, words, replace(lora, experts=experts))


def _finish(folder: RunDir, name: str, done: list[Path]) -> None:
    """Copy what is there after the last task, with what all of the training took."""
    if not IS_MAIN or folder.is_finished(name):
        return
    records = [json.loads((each / "training.json").read_text()) for each in done]
    whole = {
        **records[-1],
        **{key: sum(each[key] for each in records) for key in ("steps", "timed_steps")},
        "seconds": round(sum(each["seconds"] for each in records), 1),
        "resumed_from": next((each["resumed_from"] for each in records if each["resumed_from"]), None),
        "log": [],
    }
    if name == ADAPTER:  # each expert has its own; the one LoRA is the same all the time
        whole["trainable_parameters"] = sum(each["trainable_parameters"] for each in records)
    before = 0
    for each in records:
        whole["log"] += [{**entry, "step": entry["step"] + before} for entry in each["log"]]
        before += each["steps"]
    with new_folder(folder.stage(name)) as ready:
        shutil.copytree(done[-1], ready, dirs_exist_ok=True)
        (ready / "training.json").write_text(json.dumps(whole, indent=2) + "\n")


def train_tasks(
    source: ModelSource,
    lora: MoeLoraConfig,
    words: SequentialConfig,
    rows: dict[str, Any],
    folder: RunDir,
    tokenizer: Any,
    arguments: Callable[[str], Any],
    adapter_dtype: str,
) -> list[Path]:
    """Train tasks one after the other, from where an earlier call was stopped.

    Args:
        source: The base model.
        lora: What each expert is, a configuration of the preset lora.
        words: How.
        rows: The rows by task, in the order of training.
        folder: Gets the adapter after each task in `stages/`.
        tokenizer: The base's tokenizer.
        arguments: Makes the `SFTConfig` of a stage.
        adapter_dtype: As in `RunConfig`.

    Returns:
        The folders of the adapters after each task.

    Raises:
        RunError: If `lora` is no plain LoRA.
    """
    order = list(rows)
    first = first_config(lora, words, order[0])
    done: list[Path] = []
    for index, task in enumerate(order):
        stage = task_stage(index + 1, task)
        args = arguments(stage)
        earlier = [rows[each] for each in order[:index]]
        before = done[-1] if done else None
        train_stage(
            stage,
            partial(_make_model, source, adapter_dtype, words, first, before, task, rows[task], tokenizer, args.seed),
            args,
            folder,
            tokenizer,
            _with_replay(rows[task], earlier, words.replay, args.seed),
            label=task,
        )
        done.append(folder.stage(stage))
    return done


def _order(config: RunConfig, words: SequentialConfig) -> list[str]:
    """The tasks in their order.

    Raises:
        RunError: If they are not known, come twice, or cannot be names of folders and experts; or the run asks for
            something that this recipe does not do.
    """
    order = list(words.order if words.order is not None else config.dataset.tasks or ())
    if not order or len(set(order)) < len(order):
        raise RunError(f"sequential.order is {order}; it must list each task once, in the order of training.")
    for task in order:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", task):
            raise RunError(f"sequential.order has {task!r}; allowed: letters, digits, and . - _ in the name of a task.")
    return order


def first_config(lora: MoeLoraConfig, words: SequentialConfig, task: str) -> MoeLoraConfig:
    """The mixture of the first task alone; the words of its LoRA are those of the section `adapter`.

    Raises:
        RunError: If that is no plain LoRA.
    """
    if lora.preset != "lora":
        raise RunError(
            f"adapter.preset is {lora.preset!r} with recipe sequential; allowed: 'lora', what each expert is."
        )
    own = {name: getattr(lora.experts, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    experts = {**own, "kind": "lora_composed", "num_experts": 1, "names": [task], "ranks": [lora.r]}
    by_sequence = words.router == "centroids"
    kept = {name: getattr(lora, name) for name in MoeLoraConfig.peft_words() if hasattr(lora, name)}
    return MoeLoraConfig(
        **{
            **kept,
            "experts": {**experts, "sources": [{"source": f"trained on {task}"}]},
            "placement": {
                "kind": "linear",
                "unrouted_modules": words.common,
                "routers": "per_model" if by_sequence else "per_site",
            },
            "scores": {"kind": "centroids", "embedding": words.embedding}
            if by_sequence
            else {"kind": "linear", "activation": "sigmoid"},
            "selection": "nearest" if by_sequence else "dense",
        }
    )


def _by_task(rows: Any, order: list[str]) -> dict[str, Any]:
    """The rows of each task.

    Raises:
        RunError: If the rows do not say their task, or a task has none.
    """
    if "task" not in rows.column_names:
        raise RunError("the rows do not say their task; allowed: a column `task` (`dataset.columns: {task: NAME}`).")
    tasks = rows["task"]
    found = {task: rows.select([i for i, each in enumerate(tasks) if each == task]) for task in order}
    empty = [task for task, own in found.items() if len(own) == 0]
    if empty:
        raise RunError(
            f"sequential.order names {', '.join(empty)}, of which there are no rows; there are rows of "
            f"{', '.join(sorted(set(tasks)))}."
        )
    return found


def _with_replay(rows: Any, earlier: list[Any], share: float, seed: int) -> Any:
    """The rows of a task, and some of the tasks before it."""
    if share == 0 or not earlier:
        return rows
    old = concatenate_datasets(earlier).shuffle(seed=seed)
    again = old.select(range(min(len(old), round(share * len(rows)))))
    return concatenate_datasets([rows, again]).shuffle(seed=seed)


def _make_model(
    source: ModelSource,
    adapter_dtype: str,
    words: SequentialConfig,
    first: MoeLoraConfig,
    before: Path | None,
    task: str,
    rows: Any,
    tokenizer: Any,
    seed: int,
) -> Any:
    """The base model with the adapter of the tasks before, if there is one, and a new expert."""
    base = load_model(source)
    old = None if before is None else read_stacked(before)
    centroid = None
    if words.router == "centroids":
        # a key is of what the router looks at: an adapter of an earlier version looks at whole prompts
        opening = turn_start(tokenizer) if old is None else old.config.scores.turn_start
        centroid = _centroid(base, words, rows, tokenizer, opening)
    if before is None or old is None:  # both or neither
        if centroid is None:
            return new_adapter(base, first, adapter_dtype)
        scores = replace(first.scores, features=centroid.shape[1], turn_start=opening)
        model = new_adapter(base, replace(first, scores=scores), adapter_dtype)
        for layer in model.modules():
            for router in layer.routers.values() if isinstance(layer, MoeLoraLayer) else ():
                router.get_parameter("centroids").data.copy_(centroid)
        return model
    start: str | int = words.start if words.start != "previous" else old.num_experts - 1
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "adapter"
        add_experts(
            before, made, start=start, names=[task], rows={} if centroid is None else {"centroids": centroid}, seed=seed
        )
        return load_adapter(base, str(made), is_trainable=True)


def _centroid(base: Any, words: SequentialConfig, rows: Any, tokenizer: Any, opening: list[int]) -> Tensor:
    """The mean embedding of the task's prompts."""
    if torch.accelerator.is_available():
        base = base.to(torch.accelerator.current_accelerator())
    examples = tokenize(rows.select(range(min(len(rows), CENTROID_ROWS))), tokenizer)
    return fit_centroid(base, batches(examples, 8, base.device), words.embedding, opening).cpu()
