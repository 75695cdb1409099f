"""The rows of a run: generated, from the Hub, or from files, in one form for the trainer."""

from __future__ import annotations

from typing import Any

from moelora.errors import RunError
from moelora.runs import row_files
from moelora.runs.config import DatasetConfig
from moelora.runs.conversations import as_messages
from moelora.runs.generated import generated_rows
from moelora.runs.recipes import RECIPES, Recipe
from moelora.runs.rows import checked_rows
from moelora.runs.wording import one_line
from moelora.validation import check_keys


def load_rows(config: DatasetConfig, tokenizer: Any, recipe: str = "sft") -> Any:
    """The training rows as a `datasets.Dataset` in a random order that depends on the seed alone.

    Args:
        config: Where they come from.
        tokenizer: Decides by its chat template whether prompts become chats, unless `config.chat` says so.
        recipe: The recipe that trains on them.

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
        rows = row_files.read(row_files.matching(config.files))
    rows = _rename(rows, config, recipe)
    if config.task is not None and "task" not in rows.column_names:
        rows = rows.add_column("task", [config.task] * len(rows))
    if len(rows) == 0:
        raise RunError(f"{_source(config)} has no rows.")
    rows = _with_roles(rows, config)
    rows = checked_rows(rows, lambda index: _row(config, index), recipe)
    rows = rows.shuffle(seed=config.seed)
    if config.limit is not None:
        rows = rows.select(range(min(config.limit, len(rows))))
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
    names = list(config.tasks or sorted(set(rows["task"])))
    return rows.add_column("task_ids", [names.index(task) for task in rows["task"]])


def _source(config: DatasetConfig) -> str:
    return f"dataset {config.hub or config.files or list(config.tasks or {})!r}"


def _row(config: DatasetConfig, index: int) -> str:
    """A row before shuffling by its file and its number in it, for messages."""
    for path in row_files.matching(config.files):
        count = len(row_files.read([path]))
        if index < count:
            return f"row {index + 1} of {path}"
        index -= count
    return f"row {index + 1} of {_source(config)}"


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


def _rename(rows: Any, config: DatasetConfig, recipe: str) -> Any:
    """Give our names to the columns, and keep only those of the recipe."""
    kind = RECIPES[recipe]
    check_keys("dataset.columns", config.columns, kind.columns)
    for ours, theirs in config.columns.items():
        if theirs not in rows.column_names:
            raise RunError(
                f"dataset.columns.{ours} is {theirs!r}, which {_source(config)} does not have; it has "
                f"{', '.join(rows.column_names)}."
            )
    # A file's own column of our name gives way to the one asked for.
    clashes = [ours for ours, theirs in config.columns.items() if ours != theirs and ours in rows.column_names]
    rows = rows.remove_columns(clashes).rename_columns({t: o for o, t in config.columns.items() if t != o})
    form = next((form for form in kind.forms if all(column in rows.column_names for column in form)), None)
    if form is None:
        needed = ", or ".join(" and ".join(form) for form in kind.forms)
        first = kind.forms[0]
        raise RunError(
            f"{_source(config)} has the columns {', '.join(rows.column_names)}; needed for recipe {recipe}: {needed}. "
            f"Map them with dataset.columns: `columns: {{{', '.join(f'{column}: NAME' for column in first)}}}`."
        )
    keep = [*form, *(["task"] if "task" in rows.column_names else [])]
    return rows.select_columns(keep)


def _with_roles(rows: Any, config: DatasetConfig) -> Any:
    """Chats as messages of role and content, whichever form the rows have."""
    from datasets import Value

    of_texts = {"task", "label", "text"}
    chats = [
        column
        for column in rows.column_names
        if column == "messages" or (column not in of_texts and not isinstance(rows.features[column], Value))
    ]
    if not chats:
        return rows

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {column: as_messages(row[column], _cell(config, index, column)) for column in chats}

    return rows.map(convert, with_indices=True, remove_columns=chats, desc=None)


def _cell(config: DatasetConfig, index: int, column: str) -> str:
    return f"column {config.columns.get(column, column)!r} of {_row(config, index)}"


def _as_chat(rows: Any, config: DatasetConfig, tokenizer: Any, kind: Recipe) -> Any:
    """Prompts and the replies to them as messages, so that the tokenizer's chat template applies to them."""
    chat = tokenizer.chat_template is not None if config.chat is None else config.chat
    strings = kind.is_chat and "prompt" in rows.column_names and isinstance(rows[0]["prompt"], str)
    if config.system is not None and not (chat and strings):
        raise RunError(
            "dataset.system is set, but there is no prompt to put it before: it needs prompts that are texts, a recipe "
            "that makes chats of them, and a tokenizer with a chat template. Put it into the rows, or leave it out."
        )
    if config.chat and not strings:
        raise RunError(f"dataset.chat is true, but the rows of {_source(config)} have no prompt that becomes a chat.")
    replies = [column for column in kind.replies if column in rows.column_names]
    if any(isinstance(rows[0][column], list) and rows[0][column][0]["role"] != "assistant" for column in replies):
        return rows.remove_columns("prompt")  # whole chats, which begin with it
    if not (chat and strings):
        return rows
    if tokenizer.chat_template is None:
        raise RunError("dataset.chat is true, but the model's tokenizer has no chat template; set `chat: false`.")
    system = config.system

    def converse(row: dict[str, Any]) -> dict[str, Any]:
        answers = {column: [{"role": "assistant", "content": row[column]}] for column in replies}
        given = {column: row[column] for column in replies if isinstance(row[column], list)}
        return {"prompt": chat_prompt(row["prompt"], system), **answers, **given}

    return rows.map(converse, desc=None)


def chat_prompt(prompt: str, system: str | None) -> list[dict[str, str]]:
    """The messages of a prompt, as in training and in evaluation."""
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": prompt}]
