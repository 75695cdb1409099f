"""What a comparison's YAML may say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.suites.registry import COMMONSENSE, PROTOCOLS
from moelora.errors import RunError
from moelora.runs.schema import build
from moelora.runs.wording import one_line
from moelora.runs.yaml_file import read_words
from moelora.validation import check_at_least_one, check_keys

# Tasks without a training split of their own stay unseen.
UNSEEN = ("piqa", "hellaswag")
_OURS = {
    "learning_rate": "it is chosen per method from selection.learning_rates",
    "max_steps": "use data.steps and selection.steps",
    "num_train_epochs": "use data.steps and selection.steps",
    "seed": "use the seeds of a method",
    "output_dir": "use output_dir at the top level",
    "train_sampling_strategy": "the order of the rows is fixed for all methods",
    "max_length": "use data.max_length",
}


@dataclass(kw_only=True)
class DataConfig:
    """The mixture that all methods train on.

    Args:
        tasks: Tasks with a training split.
        rows_per_task: Rows of each, or all if it has fewer.
        selection_rows: Rows of each for choosing the learning rate, disjoint from training and scored rows.
        steps: Optimizer steps.
        max_length: Longest row in tokens; longer prompts lose their beginning.
        bucket: Batches that are sorted by length together; 1 leaves the order to chance.
        seed: Which rows are chosen.
    """

    tasks: list[str] = field(default_factory=lambda: [task for task in COMMONSENSE if task not in UNSEEN])
    rows_per_task: int = 1200
    selection_rows: int = 100
    steps: int = 300
    max_length: int = 384
    bucket: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_keys("data.tasks", self.tasks, [task for task in COMMONSENSE if task not in UNSEEN])
        check_at_least_one(self, "data", "rows_per_task", "selection_rows", "steps", "max_length", "bucket")


@dataclass(kw_only=True)
class SelectionConfig:
    """How each method's learning rate is chosen: the lowest loss of the right answers on `data.selection_rows`.

    Args:
        learning_rates: The grid, the same for every method.
        steps: Optimizer steps of each trial, with a schedule of that length.
        seed: Seed of the trials.
    """

    learning_rates: list[float]
    steps: int = 75
    seed: int = 1000

    def __post_init__(self) -> None:
        check_at_least_one(self, "selection", "steps")
        if not self.learning_rates:
            raise RunError("selection.learning_rates is empty; give at least one.")


@dataclass(kw_only=True)
class ScoringConfig:
    """How the trained models are scored.

    Args:
        limit: The first so many rows of each task; None for all.
        batch_size: Rows at once.
        routing_rows: Rows of each task whose routing is analysed.
    """

    limit: int | None = 400
    batch_size: int = 32
    routing_rows: int = 48

    def __post_init__(self) -> None:
        check_at_least_one(self, "evaluation", "limit", "batch_size", "routing_rows")


@dataclass(kw_only=True)
class MethodConfig:
    """One of the methods.

    Args:
        title: Its name in tables.
        adapter: `preset` and its words, or `peft: lora` and the words of `peft.LoraConfig`.
        seeds: Seeds of initialisation, dropout and the order of the rows.
        equal: Which size of the reference its trainable parameters must be equal to.
    """

    title: str
    adapter: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [0])
    equal: Literal["trainable", "active"] = "trainable"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise RunError(f"the seeds of {self.title!r} are {self.seeds}; give at least one, and none twice.")

    def peft_config(self) -> Any:
        """The adapter's `PeftConfig`.

        Raises:
            RunError: If it is neither a preset nor `peft: lora`, or PEFT refuses a word.
        """
        from moelora.runs.config import preset_config

        words = dict(self.adapter)
        kind = words.pop("peft", None)
        if kind is None:
            return preset_config(words)
        if kind != "lora":
            raise RunError(f"the adapter of {self.title!r} says peft: {kind!r}; allowed: 'lora', or a preset.")
        from peft import LoraConfig

        try:
            return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **words})
        except TypeError as error:
            raise RunError(f"the adapter of {self.title!r}: peft.LoraConfig refuses it: {one_line(error)}") from error


@dataclass(kw_only=True)
class BenchmarkConfig:
    """A comparison.

    Args:
        model: As in a run.
        output_dir: Folder of checkpoints and adapters.
        results_dir: Folder of results, tables and pictures.
        methods: The methods by their keys, which are names of files.
        reference: Key of the method whose size the others must have.
        selection: How learning rates are chosen.
        protocol: Protocol of the suite commonsense.
        dtype: As in a run.
        adapter_dtype: As in a run.
        model_kwargs: As in a run.
        data: The training mixture.
        training: Fields of `trl.SFTConfig`, the same for all methods.
        evaluation: How the trained models are scored.
        note: What a reader of the tables has to know beside them.
    """

    model: str
    output_dir: str
    results_dir: str
    methods: dict[str, Any]
    reference: str
    selection: SelectionConfig
    protocol: str = PROTOCOLS[0]
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: ScoringConfig = field(default_factory=ScoringConfig)
    note: str | None = None

    def __post_init__(self) -> None:
        self.methods = {
            key: each if isinstance(each, MethodConfig) else build(MethodConfig, each, f"methods.{key}")
            for key, each in self.methods.items()
        }
        check_keys("reference", [self.reference], self.methods)
        check_keys("protocol", [self.protocol], PROTOCOLS)
        for key, reason in _OURS.items():
            if key in self.training:
                raise RunError(f"training.{key} cannot be set: {reason}.")
        for key in self.methods:
            if not key.replace("_", "").isalnum():
                raise RunError(f"methods.{key}: a key is a name of files; allowed: letters, figures and underscores.")


def load_benchmark(path: str | Path, overrides: Sequence[str] = ()) -> BenchmarkConfig:
    """Read a comparison's configuration, and refuse what would fail later.

    Args:
        path: The YAML file.
        overrides: `key=value` each, as for `python -m train`.

    Raises:
        MoeLoraError: If the file cannot be read, or a key or value in it is not allowed.
    """
    config = build(BenchmarkConfig, read_words(path, overrides), "the configuration")
    for method in config.methods.values():
        method.peft_config()
    return config
