"""The folder of a run: what is in it, and whether it may be resumed.

- config.yaml: the whole configuration
- adapter/: the trained adapter, with training.json (steps, seconds, losses)
- baseline/: the plain LoRA, if the run has one
- stages/<number>-<task>/: of a sequential run, the adapter after each task
- checkpoints/<stage>/: what a stopped run is resumed from
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moelora.errors import MoeLoraError, RunError
from moelora.files import remove_leftovers, write_atomically
from moelora.runs.config import RunConfig, save_config
from moelora.runs.schema import build
from moelora.runs.yaml_file import parse_yaml

ADAPTER = "adapter"
BASELINE = "baseline"
STAGES = "stages"
# Keys that change neither the rows nor the weights.
HARMLESS = (
    "output_dir",
    "evaluation",
    "training.logging_steps",
    "training.logging_strategy",
    "training.save_steps",
    "training.save_strategy",
    "training.save_total_limit",
    "training.report_to",
    "training.run_name",
    "training.disable_tqdm",
)


def read_task_stage(folder: str) -> tuple[str, int, str] | None:
    """What `task_stage` made the name of a folder in `stages` of: what was trained, the number, the task; else None."""
    found = re.fullmatch(r"(?:(baseline)-)?(\d+)-(.+)", folder)
    return (found[1] or ADAPTER, int(found[2]), found[3]) if found else None


def task_stage(number: int, task: str, of: str = "") -> str:
    """The stage after a task, where tasks come one after the other.

    Args:
        number: The task's number, from 1.
        task: Its name.
        of: What is trained, if it is not the run's adapter.
    """
    return f"{STAGES}/{f'{of}-' if of else ''}{number}-{task}"


class RunDir:
    """The folder of a run.

    Args:
        root: The folder; it need not exist.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def config_file(self) -> Path:
        """The configuration that the run was started with."""
        return self.root / "config.yaml"

    def stage(self, name: str) -> Path:
        """Folder of a finished adapter."""
        return self.root / name

    def checkpoints(self, name: str) -> Path:
        """Folder of the checkpoints of a stage."""
        return self.root / "checkpoints" / name

    def is_finished(self, name: str) -> bool:
        """Whether a stage is trained; its folder appears in one piece."""
        return (self.stage(name) / "adapter_config.json").is_file()

    def last_checkpoint(self, name: str) -> Path | None:
        """The latest checkpoint of a stage that was written to its end; the trainer writes its state last."""
        found = [path for path in self.checkpoints(name).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        folders = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
        for folder in reversed(folders):
            try:
                json.loads((folder / "trainer_state.json").read_text())
            except (OSError, json.JSONDecodeError):
                continue
            return folder
        return None

    def is_last(self, checkpoint: Path) -> bool:
        """Whether a checkpoint was written after the last step of its training."""
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        return bool(state["global_step"] >= state["max_steps"])

    @contextmanager
    def opened(self, config: RunConfig, *, restart: bool = False) -> Iterator[None]:
        """`open` for a block of work; if that is refused before anything is trained, what `open` wrote is undone.

        Args:
            config: As in `open`.
            restart: As in `open`; what it throws away is gone.

        Raises:
            RunError: As `open`.
        """
        files = (self.config_file, self._rows_file)
        before = {file: file.read_bytes() if file.is_file() else None for file in files}
        missing = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self.open(config, restart=restart)
        work = self._work()
        try:
            yield
        except RunError:
            if self._work() == work:
                for file, content in before.items():
                    if content is None:
                        file.unlink(missing_ok=True)
                    else:
                        write_atomically(file, content)
                # the trainer makes the checkpoints' folder before it looks at the rows
                for path in (*sorted(self.root.glob("checkpoints/**"), reverse=True), *missing):
                    with suppress(OSError):  # what is not empty stays
                        path.rmdir()
            raise

    def open(self, config: RunConfig, *, restart: bool = False) -> None:
        """Start the run in this folder, or resume it; half-written stages of a run that was killed are removed.

        Args:
            config: What is to be run.
            restart: Throw away what the folder has of this run.

        Raises:
            RunError: If the folder has something trained by a configuration that differs in a way that matters, or the
                place is taken by something else.
        """
        if self.root.exists() and not self.root.is_dir():
            raise RunError(f"output_dir {str(self.root)!r} is a file; give the name of a folder.")
        if restart:
            for path in (self.root / each for each in ("checkpoints", ADAPTER, BASELINE, STAGES)):
                shutil.rmtree(path, ignore_errors=True)
        elif self._work():
            self._check_unchanged(config)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            save_config(config, self.config_file)
            # a stage that was being written when the last run was killed is perhaps none of this run's
            for place in (self.root, self.root / STAGES):
                remove_leftovers(place)
        except OSError as error:
            raise RunError(
                f"output_dir {str(self.root)!r} cannot be written: {error.strerror}. Give the name of a folder in "
                "which you may write, on a disk with space."
            ) from error

    def check_rows(self, rows: Any) -> None:
        """Note what the training rows are, and refuse to resume if they are no longer what they were.

        Raises:
            RunError: If a stage is under way or finished with other rows.
        """
        file, found = self._rows_file, rows_digest(rows)
        if self._work() and file.is_file() and (before := json.loads(file.read_text())) != found:
            raise RunError(
                f"the training rows are not those that {str(self.root)!r} was started with ({before['rows']} then, "
                f"{len(rows)} now, or other content). Give another output_dir, or --restart to throw the old run away."
            )
        write_atomically(file, json.dumps(found, indent=2) + "\n")

    def check_rows_are(self, rows: Any) -> None:
        """Refuse training rows that are not those that were noted: what would be held out of them may be trained on.

        Raises:
            RunError: If they differ.
        """
        file = self._rows_file
        if file.is_file() and json.loads(file.read_text()) != rows_digest(rows):
            raise RunError(
                f"the training rows are not those of the run {str(self.root)!r} any more, so that what is held out of "
                "them now may have been trained on; needed: files, dataset.seed and dataset.held_out as in training. "
                "Rows that the run has not seen can be scored with --data."
            )

    @property
    def _rows_file(self) -> Path:
        return self.root / "rows.json"

    def _work(self) -> dict[str, Path | None]:
        """The stages that are trained or under way, with their last checkpoints."""
        of_tasks = {
            f"{STAGES}/{path.name}"
            for place in (self.root, self.root / "checkpoints")
            for path in place.glob(f"{STAGES}/*")
        }
        last = {name: self.last_checkpoint(name) for name in (ADAPTER, BASELINE, *of_tasks)}
        return {name: path for name, path in last.items() if path or self.is_finished(name)}

    def _check_unchanged(self, config: RunConfig) -> None:
        if not self.config_file.is_file():
            raise RunError(
                f"output_dir {str(self.root)!r} has a trained adapter but no config.yaml, so it cannot be told whether "
                "this is the same run. Give another output_dir, or --restart to throw the old run away."
            )
        ignored: tuple[str, ...] = HARMLESS
        if not self.is_finished(BASELINE) and self.last_checkpoint(BASELINE) is None:
            ignored = (*HARMLESS, "baseline")
        before = with_defaults(parse_yaml(self.config_file.read_text()))
        changed = changes(before, dataclasses.asdict(config), ignored)
        if changed:
            raise RunError(
                f"output_dir {str(self.root)!r} holds a run of another configuration: {'; '.join(changed)}. Give "
                "another output_dir, undo the change, or --restart to throw the old run away."
            )


def with_defaults(words: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the keys that came later at their defaults; as it is where it cannot be read."""
    try:
        return dataclasses.asdict(build(RunConfig, words, "the configuration"))
    except MoeLoraError:
        return words


def rows_digest(rows: Any) -> dict[str, Any]:
    """What tells one list of rows from another: how many, and a hash of their content."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def changes(before: Any, now: Any, ignored: Sequence[str] = ()) -> list[str]:
    """What differs between two nested mappings, one text per dotted key.

    Args:
        before, now: The mappings.
        ignored: Dotted keys that do not matter, with everything under them.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == k or key.startswith(f"{k}.") for k in ignored)
    ]


def _flat(words: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys; empty ones vanish."""
    if isinstance(words, dict):
        for key, value in words.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif words is not None:
        yield prefix, words
