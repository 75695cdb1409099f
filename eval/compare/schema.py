"""What a comparison's YAML may say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.compare.regimes import read_regime
from eval.compare.regimes.apart import Apart
from eval.compare.regimes.grouped import Grouped
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
    "seed": "use the seeds of a method",
    "output_dir": "use output_dir at the top level",
}
_OURS_OF_SUITE = {
    "max_steps": "use data.steps and selection.steps",
    "num_train_epochs": "use data.steps and selection.steps",
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
class SkillData:
    """Tasks of reasoning-gym, each of which is a skill of its own.

    Problems for training, for choosing the learning rate and for scoring come from seeds of their own, and no prompt is
    in two of them.

    Args:
        tasks: The tasks by name, each with its options. Where they come one after the other, this is their order for
            seed 0; seed s begins with task s.
        rows_per_task: Training rows of each.
        selection_rows: Problems of each for choosing the learning rate.
        fit_rows: The first so many training rows of each, for fitting routers of compositions.
        foreign: More tasks, which nothing is trained on: whether their prompts stay with the base model.
        seed: Seed of the training rows.
        system: System message before every prompt.
    """

    tasks: dict[str, Any]
    rows_per_task: int = 130
    selection_rows: int = 48
    fit_rows: int = 8
    foreign: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    system: str | None = None

    def __post_init__(self) -> None:
        if len(self.tasks) < 2:
            raise RunError(f"data.tasks has {len(self.tasks)} task; allowed: at least two.")
        check_at_least_one(self, "data", "rows_per_task", "selection_rows", "fit_rows")
        if self.fit_rows > self.rows_per_task:
            raise RunError(
                f"data.fit_rows is {self.fit_rows} with rows_per_task {self.rows_per_task}; allowed: 1 to "
                f"{self.rows_per_task}, they are the first of these rows."
            )

    def order(self, seed: int) -> list[str]:
        """The tasks in the order in which they come for a seed."""
        names = list(self.tasks)
        first = seed % len(names)
        return names[first:] + names[:first]


@dataclass(kw_only=True)
class SelectionConfig:
    """How each method's learning rate is chosen on `data.selection_rows`: by the lowest loss of the right answers, on
    tasks of reasoning-gym by the most right answers (see `eval.compare.measures`).

    Args:
        learning_rates: The grid, the same for every method that has no learning rate of its own.
        steps: Optimizer steps of each trial, with a schedule of that length; on tasks of reasoning-gym a trial is a
            whole training.
        seed: Seed of the trials.
    """

    learning_rates: list[float] = field(default_factory=list)
    steps: int = 75
    seed: int = 1000

    def __post_init__(self) -> None:
        check_at_least_one(self, "selection", "steps")


@dataclass(kw_only=True)
class ScoringConfig:
    """How the trained models are scored.

    Args:
        limit: The first so many rows of each task; None for all.
        batch_size: Rows at once.
        routing_rows: Rows of each task whose routing is analysed.
        earlier_turns: On tasks of reasoning-gym: how many solved problems of other tasks stand in the conversation
            before each problem, those of the tasks that come next in `data.tasks`; 0 asks each problem alone.
    """

    limit: int | None = 400
    batch_size: int = 32
    routing_rows: int = 48
    earlier_turns: int = 0

    def __post_init__(self) -> None:
        check_at_least_one(self, "evaluation", "limit", "batch_size", "routing_rows")


@dataclass(kw_only=True)
class MethodConfig:
    """One of the methods.

    Args:
        title: Its name in tables.
        adapter: `preset` and its words, or `peft: lora` and the words of `peft.LoraConfig`. With the regimes "apart"
            and "grown" it is what each task gets; with "composed" there is none.
        regime: How it sees the tasks, `kind` and the words of `eval.compare.regimes`; None trains on all at once.
        seeds: Seeds of initialisation, dropout and the order of the rows.
        learning_rate: Given where it was chosen in another comparison; None chooses it from `selection`.
        equal: Which size of the reference its trainable parameters must be equal to. With "with_router" they count
            together with those of a router that is not trained: a control has the shape of what it controls for.
        against: Key of the method that tables compare it with; None for the plain LoRA that is trained on all at once.
    """

    title: str
    adapter: dict[str, Any] | None = None
    regime: Any = None
    seeds: list[int] = field(default_factory=lambda: [0])
    learning_rate: float | None = None
    equal: Literal["trainable", "active", "with_router"] = "trainable"
    against: str | None = None

    def __post_init__(self) -> None:
        self.regime = read_regime(self.regime, f"the regime of {self.title!r}")
        if (self.adapter is None) != (self.regime.made_of is not None):
            raise RunError(
                f"{self.title!r} has {'no' if self.adapter is None else 'an'} adapter with regime "
                f"{self.regime.kind!r}; allowed: an adapter for what is trained, none for what is composed."
            )
        if self.learning_rate is not None and (self.adapter is None or self.learning_rate <= 0):
            raise RunError(
                f"the learning_rate of {self.title!r} is {self.learning_rate}; allowed: a number above 0 for what is "
                "trained, none for what is composed."
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise RunError(f"the seeds of {self.title!r} are {self.seeds}; give at least one, and none twice.")

    def peft_config(self) -> Any:
        """The adapter's `PeftConfig`.

        Raises:
            RunError: If it is neither a preset nor `peft: lora`, or PEFT refuses a word.
        """
        from moelora.runs.config import preset_config

        words = dict(self.adapter or {})
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
        recipe: How tasks of reasoning-gym are trained on and scored: "sft" on right answers, scored by exact ones; or
            "dpo" on pairs of answers, scored by how often the right one is more likely (see `eval.compare.measures`).
        dtype: As in a run.
        adapter_dtype: As in a run.
        model_kwargs: As in a run.
        data: The training rows: with a list of tasks those of the suite commonsense (`DataConfig`), with a mapping
            tasks of reasoning-gym (`SkillData`).
        training: Fields of the trainer's arguments (`trl.SFTConfig`, `trl.DPOConfig`), the same for all methods.
        evaluation: How the trained models are scored.
        note: What a reader of the tables has to know beside them.
    """

    model: str
    output_dir: str
    results_dir: str
    methods: dict[str, Any]
    reference: str
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    protocol: str = PROTOCOLS[0]
    recipe: Literal["sft", "dpo"] = "sft"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    data: Any = field(default_factory=DataConfig)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: ScoringConfig = field(default_factory=ScoringConfig)
    note: str | None = None

    def __post_init__(self) -> None:
        self.methods = {
            key: each if isinstance(each, MethodConfig) else build(MethodConfig, each, f"methods.{key}")
            for key, each in self.methods.items()
        }
        if isinstance(self.data, dict):
            skills = isinstance(self.data.get("tasks"), dict)
            self.data = build(SkillData if skills else DataConfig, self.data, "data")
        check_keys("reference", [self.reference], self.methods)
        check_keys("protocol", [self.protocol], PROTOCOLS)
        self._check_recipe()
        self._check_regimes()
        for key, reason in {**_OURS, **({} if self.has_skills else _OURS_OF_SUITE)}.items():
            if key in self.training:
                raise RunError(f"training.{key} cannot be set: {reason}.")
        for key in self.methods:
            if key == "base":
                raise RunError("methods.base: that is the base model's name in files and tables; allowed: any other.")
            if not key.replace("_", "").isalnum():
                raise RunError(f"methods.{key}: a key is a name of files; allowed: letters, figures and underscores.")

    @property
    def has_skills(self) -> bool:
        """Whether it is about tasks of reasoning-gym, and not about the suite commonsense."""
        return isinstance(self.data, SkillData)

    def _check_recipe(self) -> None:
        if self.recipe == "sft":
            return
        if not self.has_skills:
            raise RunError(f"recipe is {self.recipe!r} with the suite commonsense; allowed: 'sft'.")
        if self.evaluation.earlier_turns:
            raise RunError(
                f"evaluation.earlier_turns is {self.evaluation.earlier_turns} with recipe {self.recipe!r}; allowed: 0."
            )
        for key, method in self.methods.items():
            if method.regime.trains_itself:
                raise RunError(
                    f"methods.{key} has regime {method.regime.kind!r}, which trains on answers, with recipe "
                    f"{self.recipe!r}; allowed: another regime, or recipe 'sft'."
                )

    def _check_regimes(self) -> None:
        turns = self.evaluation.earlier_turns
        most = len(self.data.tasks) - 1 if self.has_skills else 0
        if not 0 <= turns <= most:
            raise RunError(
                f"evaluation.earlier_turns is {turns}; allowed: 0 to {most}, one problem of each other task of "
                "reasoning-gym."
            )
        for key, method in self.methods.items():
            regime = method.regime
            if not self.selection.learning_rates and method.adapter is not None and method.learning_rate is None:
                raise RunError(
                    f"selection.learning_rates is empty and methods.{key} has no learning_rate; give either."
                )
            if method.against is not None:
                check_keys(f"methods.{key}.against", [method.against], self.methods)
            if regime.kind != "together" and not self.has_skills:
                raise RunError(
                    f"methods.{key} has regime {regime.kind!r} with tasks of the suite commonsense; allowed: "
                    "'together', or `data.tasks` as a mapping of reasoning-gym tasks."
                )
            if isinstance(regime, Grouped) and sorted(t for its in regime.groups.values() for t in its) != sorted(
                self.data.tasks
            ):
                raise RunError(
                    f"methods.{key}.regime.groups holds {regime.groups}; allowed: each of {', '.join(self.data.tasks)} "
                    "in exactly one group."
                )
            of = regime.made_of
            if of is None:
                continue
            apart = [each for each, other in self.methods.items() if isinstance(other.regime, Apart)]
            check_keys(f"methods.{key}.regime.of", [of], apart)
            missing = set(method.seeds) - set(self.methods[of].seeds)
            if missing:
                raise RunError(
                    f"methods.{key} asks for the seeds {sorted(missing)}, which {of}, whose LoRAs it is made "
                    f"of, does not have; allowed: {self.methods[of].seeds}."
                )


def load_benchmark(path: str | Path, overrides: Sequence[str] = ()) -> BenchmarkConfig:
    """Read a comparison's configuration, and refuse what would fail later.

    Args:
        path: The YAML file.
        overrides: `key=value` each, as for `moelora train`.

    Raises:
        MoeLoraError: If the file cannot be read, or a key or value in it is not allowed.
    """
    config = build(BenchmarkConfig, read_words(path, overrides), "the configuration")
    for method in config.methods.values():
        if method.adapter is not None:
            method.peft_config()
    return config
