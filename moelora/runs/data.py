"""The rows of a run: generated, from the Hub, or from files, in one form for the trainer."""

from __future__ import annotations

import csv
import glob
from pathlib import Path
from typing import Any

from moelora.errors import RunError
from moelora.runs.config import DatasetConfig
from moelora.runs.conversations import as_messages
from moelora.runs.generated import generated_rows
from moelora.runs.held_out import hold_out
from moelora.runs.recipes import RECIPES, Recipe
from moelora.runs.rows import checked_rows
from moelora.runs.wording import one_line
from moelora.validation import check_keys

# Suffixes of the files that `datasets` reads, and its name for them.
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
SUFFIXES = tuple(_BUILDERS)
"""Those of the files that rows are read from."""


def load_rows(config: DatasetConfig, tokenizer: Any, recipe: str = "sft", *, held_out: bool = False) -> Any:
    """The training rows as a `datasets.Dataset` in a random order that depends on the seed alone.

    Args:
        config: Where they come from.
        tokenizer: Decides by its chat template whether prompts become chats, unless `config.chat` says so.
        recipe: The recipe that trains on them.
        held_out: Give the rows that `config.held_out` keeps from training instead.

    Returns:
        Rows of one of the recipe's forms, for sft `prompt` and `completion`, `messages`, or `text`; and of `task` where
        it is known.

    Raises:
        MoeLoraError: If there are no rows, they have none of these forms, or a row cannot be trained on.
    """
    kind = RECIPES[recipe]
    if config.tasks:
        rows = _generated(config, kind)
    elif config.hub:
        rows = _from_hub(config)
    else:
        rows = _from_files(config)
    rows = _rename(rows, config, recipe)
    if config.task is not None and "task" not in rows.column_names:
        rows = rows.add_column("task", [config.task] * len(rows))
    if len(rows) == 0:
        raise RunError(f"{_source(config)} has no rows.")
    rows = _with_roles(rows, config)
    rows = checked_rows(rows, recipe, lambda index: _row(config, index))
    rows = rows.shuffle(seed=config.seed)
    if config.limit is not None:
        rows = rows.select(range(min(config.limit, len(rows))))
    if config.held_out:
        trained, kept = hold_out(rows, config.held_out, config.seed)
        rows = rows.select(kept if held_out else trained)
    return _as_chat(rows, config, tokenizer, kind)


def with_task_ids(rows: Any, config: DatasetConfig) -> Any:
    """The rows with a column `task_ids`, for an adapter that routes by it: the number of each row's task.

    Args:
        rows: What `load_rows` gave.
        config: Where they came from; its `tasks` are numbered in their order, other tasks in that of their names.

    Raises:
        RunError: If the rows have no column of tasks.
    """
    if "task" not in rows.column_names:
        raise RunError(
            f"the adapter routes by the task, and {_source(config)} has no column of tasks; allowed: dataset.tasks, or "
            "a column with the name of each row's task. Map it with `columns: {task: ...}`."
        )
    names = task_names(rows, config)
    return rows.add_column("task_ids", [names.index(str(task)) for task in rows["task"]])


def task_names(rows: Any, config: DatasetConfig) -> list[str]:
    """The tasks of training rows in the order of their numbers; none where rows do not say their task.

    Args:
        rows: What `load_rows` gave.
        config: Where they came from.
    """
    if config.tasks or "task" not in rows.column_names:
        return list(config.tasks or [])
    return list(map(str, sorted(set(rows["task"]))))


def _source(config: DatasetConfig) -> str:
    return f"dataset {config.hub or config.files or list(config.tasks or {})!r}"


def _generated(config: DatasetConfig, kind: Recipe) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(generated_rows(config, kind.forms[0])))


def _from_hub(config: DatasetConfig) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(config.hub, config.name, split=config.split, revision=config.revision)
    except (OSError, ValueError) as error:
        raise RunError(
            f"dataset.hub {config.hub!r} (name {config.name!r}, split {config.split!r}) cannot be loaded: "
            f"{one_line(error)} Check the name on the Hub, and the token if it is private."
        ) from error


def _row(config: DatasetConfig, index: int) -> str:
    """A row by its file and its number in it, for messages."""
    if config.files:
        for path in _paths(config):
            count = len(_read([path]))
            if index < count:
                return f"row {index + 1} of {path}"
            index -= count
    return f"row {index + 1} of {_source(config)}"


def _from_files(config: DatasetConfig) -> Any:
    paths = _paths(config)
    suffixes = sorted({Path(path).suffix for path in paths})
    builders = {_BUILDERS.get(suffix) for suffix in suffixes}
    if None in builders or len(builders) != 1:
        raise RunError(f"dataset.files are of kind {', '.join(suffixes)}; allowed: one kind of {', '.join(_BUILDERS)}.")
    return _read(paths)


def _paths(config: DatasetConfig) -> list[str]:
    """The files that the patterns match.

    Raises:
        RunError: If one matches none, or a file is empty.
    """
    patterns = [config.files] if isinstance(config.files, str) else list(config.files or [])
    paths: list[str] = []
    for pattern in patterns:
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207 - absolute ones too
        if not found:
            raise RunError(f"dataset.files: no file matches {pattern!r} (from {Path.cwd()}).")
        paths += found
    empty = [path for path in paths if Path(path).is_file() and Path(path).stat().st_size == 0]
    if empty:
        raise RunError(f"dataset.files: {', '.join(empty)} is empty; needed: rows.")
    return paths


def _read(paths: list[str]) -> Any:
    """The rows of files of one kind, one after the other.

    Raises:
        RunError: If one is not readable.
    """
    from datasets import load_dataset

    suffix = Path(paths[0]).suffix
    words: dict[str, Any] = {}
    if _BUILDERS[suffix] == "csv":
        delimiter = "\t" if suffix == ".tsv" else ","
        headers = [_check_table(path, delimiter) for path in paths]
        words = {"delimiter": delimiter, **_csv_words(headers[0])}
    elif _BUILDERS[suffix] == "json":
        for path in paths:
            _check_utf8(path)
    try:
        return load_dataset(_BUILDERS[suffix], data_files=paths, split="train", **words)
    except Exception as error:  # pandas, pyarrow, gzip, json and datasets each raise their own
        reason = one_line(error.__cause__ or error)[:300]
        if "corresponds to no data" in reason:
            raise RunError(f"dataset.files {', '.join(paths)}: no rows.") from error
        raise RunError(f"dataset.files {', '.join(paths)}: not readable as {suffix}: {reason}") from error


def _csv_words(header: list[str]) -> dict[str, Any]:
    """How a table is read: cells as they are written, so that "007" and "NA" stay texts; a blank cell is missing."""
    from datasets import Features, Value

    features = Features({name: Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _check_table(path: str, delimiter: str) -> list[str]:
    """The header of a table, no row of which has more cells than that: pandas would take the first ones for an index.

    Raises:
        RunError: Names the line.
    """
    longest = csv.field_size_limit(2**31 - 1)
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = next(reader, [])
            for row in reader:
                if len(row) > len(header):
                    raise RunError(
                        f"line {reader.line_num} of {path} has {len(row)} cells, and the header "
                        f"{len(header)}; allowed: as many. Put cells that hold the separator into quotes."
                    )
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"line {reader.line_num + 1} of {path} is not readable: {one_line(error)}") from error
    finally:
        csv.field_size_limit(longest)
    if len(set(header)) < max(1, len(header)):
        raise RunError(f"the header of {path} is {header}; needed: a name for each column, no two alike.")
    return header


def _check_utf8(path: str) -> None:
    """Refuse text in another encoding, which pyarrow reads and nobody can use.

    Raises:
        RunError: Names the line.
    """
    with Path(path).open("rb") as file:
        if file.read(2) == b"\x1f\x8b":  # gzip, which `datasets` unpacks
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise RunError(f"line {number} of {path} is not UTF-8: {one_line(error)} Convert the file.") from error


def _rename(rows: Any, config: DatasetConfig, recipe: str) -> Any:
    """Give our names to the columns, and keep only those of the recipe."""
    kind = RECIPES[recipe]
    check_keys("dataset.columns", config.columns, kind.columns)
    for ours, theirs in config.columns.items():
        if theirs not in rows.column_names:
            raise RunError(
                f"dataset.columns.{ours} is {theirs!r}, which {_source(config)} does not have; it has "
                f"{', '.join(rows.column_names)}. Name one of those, as in `dataset.columns.{ours}=NAME`, or drop the "
                "mapping, as in `dataset.columns={}`."
            )
    # A file's own column of our name gives way to the one asked for.
    clashes = [ours for ours, theirs in config.columns.items() if ours != theirs and ours in rows.column_names]
    rows = rows.remove_columns(clashes).rename_columns({t: o for o, t in config.columns.items() if t != o})
    form = next((form for form in kind.forms if all(column in rows.column_names for column in form)), None)
    if form is None:
        needed = ", or ".join(" and ".join(form) for form in kind.forms)
        words = ", ".join(f"{column}: NAME" for column in kind.forms[0])
        raise RunError(
            f"{_source(config)} has the columns {', '.join(rows.column_names)}; needed for recipe {recipe}: {needed}. "
            f"Map them with dataset.columns: `columns: {{{words}}}`."
        )
    keep = [*form, *(["task"] if "task" in rows.column_names else [])]
    return rows.select_columns(keep)


def _with_roles(rows: Any, config: DatasetConfig) -> Any:
    """Chats as messages of role and content, whichever form the rows have."""
    from datasets import Value

    texts = [name for name, feature in rows.features.items() if isinstance(feature, Value)]
    chats = [
        name
        for name in ("messages", "chosen", "rejected")
        if name in rows.column_names and (name == "messages" or name not in texts)
    ]
    if not chats:
        return rows

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {name: as_messages(row[name], f"row {index + 1} of {_source(config)}") for name in chats}

    return rows.map(convert, with_indices=True, remove_columns=chats, desc=None)


def _as_chat(rows: Any, config: DatasetConfig, tokenizer: Any, kind: Recipe) -> Any:
    """Prompts and the replies to them as messages, so that the tokenizer's chat template applies to them."""
    chat = tokenizer.chat_template is not None if config.chat is None else config.chat
    replies = [column for column in kind.replies if column in rows.column_names]
    is_text = "prompt" in rows.column_names and isinstance(rows[0]["prompt"], str)
    if is_text and any(isinstance(rows[0][column], list) for column in replies):
        rows = rows.remove_columns("prompt")  # the replies are whole chats, which begin with it
    strings = kind.is_chat and "prompt" in rows.column_names and isinstance(rows[0]["prompt"], str)
    if config.system is not None and not (chat and strings):
        raise RunError(
            "dataset.system is set, but there is no prompt to put it before: it needs prompts that are texts, a recipe "
            "that makes chats of them, and a tokenizer with a chat template. Put it into the rows, or leave it out."
        )
    if config.chat and not strings:
        raise RunError(f"dataset.chat is true, but the rows of {_source(config)} have no prompt that becomes a chat.")
    if not (chat and strings):
        return rows
    if tokenizer.chat_template is None:
        raise RunError("dataset.chat is true, but the model's tokenizer has no chat template; set `chat: false`.")
    system = config.system

    def converse(row: dict[str, Any]) -> dict[str, Any]:
        answers = {column: [{"role": "assistant", "content": row[column]}] for column in replies}
        return {"prompt": chat_prompt(row["prompt"], system), **answers}

    return rows.map(converse, desc=None)


def chat_prompt(prompt: str, system: str | None) -> list[dict[str, str]]:
    """The messages of a prompt, as in training and in evaluation."""
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": prompt}]
