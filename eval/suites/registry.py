"""From the words of a command line to tasks of lm-eval."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelora.errors import MoeLoraError, RunError
from moelora.runs.wording import one_line

FOLDER = Path(__file__).parent
PROTOCOLS = ("loglik", "letters", "instruct")
# The order of tables.
COMMONSENSE = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "openbookqa",
    "social_i_qa",
    "winogrande",
    "piqa",
    "hellaswag",
)
SUITES = ("commonsense", "reasoning")
_OTHER = "lm-eval"


@dataclass(frozen=True)
class Suite:
    """Tasks that are scored together.

    Args:
        name: Its name, or the tasks as they were asked for.
        protocol: How prompts are made and answers read; numbers of different protocols are never compared.
        tasks: Task name to lm-eval's task.
        manager: The lm-eval manager that made them.
        system: System message of the chat that prompts become where the model has a template; None for no chat.
    """

    name: str
    protocol: str
    tasks: dict[str, Any]
    manager: Any
    system: str | None = None

    def label(self, task: str) -> str:
        """What tables call a task."""
        return str(self._metadata(task).get("label", task))

    def metric(self, task: str) -> str:
        """The metric that tables show of a task; all others are in the results too."""
        own = self._metadata(task).get("metric")
        if own is not None:
            return str(own)
        defined = list(self.tasks[task].aggregation())
        return "acc_norm" if "acc_norm" in defined else defined[0]

    def version(self, task: str) -> str:
        """The version that the task's YAML states."""
        return str(self._metadata(task).get("version", "none"))

    def _metadata(self, task: str) -> dict[str, Any]:
        found = self.tasks[task].config.metadata
        return found if isinstance(found, dict) else {}


def load_suite(name: str, protocol: str | None = None) -> Suite:
    """The tasks of a suite.

    Args:
        name: "commonsense", "reasoning", or anything that lm-eval knows: names of tasks, groups or tags and YAML files,
            separated by commas.
        protocol: One of `PROTOCOLS` for commonsense, whose default is "loglik"; the others have one of their own.

    Raises:
        RunError: If there is no such task, or its rows cannot be had.
    """
    manager_class = _task_manager()
    if name == "commonsense":
        protocol = protocol or PROTOCOLS[0]
        if protocol not in PROTOCOLS:
            raise RunError(f"protocol {protocol!r} is unknown; allowed: {', '.join(PROTOCOLS)}.")
        ending = "" if protocol == "loglik" else f"_{protocol}"
        manager = manager_class(include_path=str(FOLDER / name / protocol), include_defaults=False)
        return _load(manager, name, protocol, [f"moelora_{task}{ending}" for task in COMMONSENSE])
    if protocol is not None:
        raise RunError(
            f"--protocol {protocol} belongs to the suite commonsense; the tasks of {name!r} say themselves how they "
            "are scored. Leave it out."
        )
    if name == "reasoning":
        manager = manager_class(include_path=str(FOLDER / name), include_defaults=False)
        return _load(manager, name, "generate", manager.all_subtasks, system="Reply with the answer only.")
    wanted = [word.strip() for word in name.split(",") if word.strip()]
    files = all(word.endswith((".yaml", ".yml")) for word in wanted)
    for word in wanted:
        if word.endswith((".yaml", ".yml")) and not Path(word).is_file():
            raise RunError(f"suite {word!r}: there is no such file.")
    manager = manager_class(include_defaults=not files)
    unknown = [word for word in wanted if word not in manager.all_tasks and not Path(word).is_file()]
    if unknown or not wanted:
        close = difflib.get_close_matches(unknown[0] if unknown else "", [*SUITES, *manager.all_tasks], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise RunError(
            f"suite {', '.join(map(repr, unknown)) or repr(name)} is unknown. Allowed: {', '.join(SUITES)}, the names "
            f"of lm-eval's tasks, and YAML files of tasks{hint}"
        )
    return _load(manager, name, _OTHER, wanted)


def _task_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RunError(
            f"scoring is done by lm-eval, which cannot be imported ({error}): pip install lm-eval."
        ) from error
    # It says at the level of warnings what its users meant by the very words they gave.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager


def _load(manager: Any, name: str, protocol: str, tasks: list[str], system: str | None = None) -> Suite:
    try:
        loaded = manager.load(tasks)["tasks"]
    except MoeLoraError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"suite {name!r} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    if any(task in loaded for task in tasks):
        loaded = {task: loaded[task] for task in [*tasks, *loaded] if task in loaded}
    return Suite(name, protocol, loaded, manager, system)
