"""The base model and the rows that `moelora expert` measures on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moelora.compose.editing import SiteRouting, fit_router_rows, mean_loss, measure_routing
from moelora.compose.editing.stacked import read_words
from moelora.compose.tokens import batches, tokenize
from moelora.errors import ComposeError, MoeLoraError
from moelora.runs.config import DatasetConfig
from moelora.runs.data import load_rows
from moelora.runs.models import ModelSource, load_adapter, load_model, load_tokenizer
from moelora.runs.wording import one_line


@dataclass(frozen=True, eq=False)
class Measured:
    """What an adapter does on the rows."""

    loss: float
    routing: dict[str, SiteRouting]


@dataclass(frozen=True, eq=False)
class ScoredData:
    """A base model and rows.

    Attributes:
        base: The base model, without an adapter between the measurements.
        tokenizer: Its tokenizer.
        options: The words of the command.
    """

    base: Any
    tokenizer: Any
    options: argparse.Namespace

    @classmethod
    def open(cls, options: argparse.Namespace) -> ScoredData:
        """Load the base model.

        Raises:
            MoeLoraError: If it is not known, or cannot be loaded.
        """
        folder = Path(options.adapter)
        if not (folder / "adapter_config.json").is_file():
            raise ComposeError(f"{options.adapter!r} holds no adapter: adapter_config.json missing.")
        name = options.base or read_words(folder).get("base_model_name_or_path")
        if not name:
            raise ComposeError("the adapter does not record its base model; allowed: --base MODEL.")
        source = ModelSource(name, dtype=options.dtype)
        return cls(load_model(source).eval(), load_tokenizer(source), options)

    def batches(self, files: str | list[str]) -> list[Any]:
        """The rows of files as batches."""
        rows = load_rows(DatasetConfig(files=files, limit=self.options.limit), self.tokenizer)
        return self._batches(rows)

    def _batches(self, rows: Any) -> list[Any]:
        return list(batches(tokenize(rows, self.tokenizer), self.options.batch_size, self.base.device))

    def measure(self, adapter: str, *, routing: bool = False) -> Measured:
        """The loss of an adapter on the rows, and where its tokens go.

        Raises:
            MoeLoraError: If the adapter does not fit the base model.
        """
        try:
            model = load_adapter(self.base, adapter)
        except MoeLoraError:
            raise
        except (ValueError, RuntimeError, KeyError, OSError) as error:  # what PEFT raises for its own LoRA
            raise ComposeError(
                f"{adapter!r} does not fit the base model {self.base.config._name_or_path!r}: {one_line(error)[:300]} "
                "Allowed: --base with the model it was trained on."
            ) from error
        batches = self.batches(self.options.data)
        found = Measured(mean_loss(model, batches), measure_routing(model, batches) if routing else {})
        model.unload()
        return found

    def router_rows(self, adapter: str, file: str) -> dict[str, Tensor]:
        """What the expert that a file's rows are for needs in a router by centroids.

        Raises:
            ComposeError: If the adapter is not routed by centroids, or no row is of the new expert's task.
        """
        (name,) = self.options.name or ("new",)
        rows = load_rows(DatasetConfig(files=file), self.tokenizer)
        if "task" in rows.column_names:
            rows = self._of_task(rows, file)
        limit = len(rows) if self.options.limit is None else min(self.options.limit, len(rows))
        return fit_router_rows(self.base, self._batches(rows.select(range(limit))), adapter, name)

    def _of_task(self, rows: Any, file: str) -> Any:
        """The rows whose column `task` has the name of the new expert; all, if they are of one task and it has none.

        Raises:
            ComposeError: If there are none, or the rows are of several tasks and the expert has no name.
        """
        tasks = [str(task) for task in rows["task"]]
        (name,) = self.options.name or (None,)
        known = sorted(set(tasks))
        if name is None and len(known) == 1:
            return rows
        found = [number for number, task in enumerate(tasks) if task == name]
        if not found:
            raise ComposeError(
                f"the new expert is called {name!r}, and --rows {file!r} has rows of the tasks {', '.join(known)} in "
                "its column task; allowed: one of these as --name, or a file without that column."
            )
        return rows.select(found)
