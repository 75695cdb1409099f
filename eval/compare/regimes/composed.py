"""LoRAs that were trained apart, as one model: by our routers, by PEFT's merges, by PEFT's Arrow."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from eval.compare.regimes.base import Regime, Work, joined, save_only
from moelora.compose import from_loras
from moelora.compose.tokens import tokenize
from moelora.errors import RunError
from moelora.files import new_folder, write_atomically
from moelora.runs.folder import ADAPTER
from moelora.runs.models import load_model

_MADE = "composed"


@dataclass(kw_only=True)
class Composed(Regime):
    """The LoRAs of another method as one model; exactly one of `router`, `merge` and `arrow` says how.

    Args:
        of: The method, of regime "apart".
        router: As in `moelora.compose.from_loras`; it is fitted on the first rows of each task.
        tune: Arguments of the trainer that trains what the router leaves to be trained, on those rows; None trains
            nothing.
        merge: Arguments of PEFT's `add_weighted_adapter`; `weight` is that of each LoRA.
        arrow: Words of PEFT's `ArrowConfig`.
    """

    kind: ClassVar[str] = "composed"
    answers_with_one: ClassVar[bool] = False

    of: str
    router: Any = None
    tune: dict[str, Any] | None = None
    merge: dict[str, Any] = field(default_factory=dict)
    arrow: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [name for name in ("router", "merge", "arrow") if getattr(self, name)]
        if len(given) != 1:
            raise RunError(
                f"a composition of {self.of!r} says {' and '.join(given) or 'none'} of router, merge and arrow; "
                "allowed: exactly one."
            )

    @property
    def made_of(self) -> str:
        """The method of the LoRAs."""
        return self.of

    def train(self, work: Work) -> dict[str, Path]:
        """Make the composition, and train its router where that is asked for."""
        if self.arrow:
            return {}
        name = _MADE if self.tune is not None else ADAPTER
        if not work.folder.is_finished(name):
            self._make(work, work.folder.stage(name))
        if self.tune is not None:
            rows = joined(work.fit_rows, list(work.fit_rows))
            work.train(ADAPTER, lambda: work.continued(work.folder.stage(name)), rows, **self.tune)
        return {}

    def _make(self, work: Work, folder: Path) -> None:
        started = time.monotonic()
        loras = {task: str(path) for task, path in (work.parts or {}).items()}
        base = load_model(work.source)
        with new_folder(folder) as ready:
            if self.router:
                examples = {task: tokenize(map(_answered, work.fit_rows[task]), work.tokenizer) for task in loras}
                model = from_loras(base, loras, self.router, examples=examples, tokenizer=work.tokenizer)
                model.save_pretrained(str(ready))
            else:
                model, words = _with_all(base, loras), dict(self.merge)
                weight = float(words.pop("weight", 1.0))
                model.add_weighted_adapter(list(loras), [weight] * len(loras), "merged", **words)
                save_only(model, "merged", ready)
            # what a training notes, for a run that is stopped before it is scored; not beside the adapter, whose card
            # would call it trained
            record = {"steps": 0, "timed_steps": 0, "seconds": round(time.monotonic() - started, 1)}
            note = work.folder.root / "made" / "training.json"
            write_atomically(note, json.dumps(record) + "\n")

    def models(self, work: Work, tasks: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
        """One model answers everything."""
        if not self.arrow:
            yield list(tasks), work.load(work.folder.stage(ADAPTER))
            return
        from peft import create_arrow_model
        from peft.tuners.lora.config import ArrowConfig

        paths = [str(path) for path in (work.parts or {}).values()]
        yield list(tasks), create_arrow_model(load_model(work.source), paths, ArrowConfig(**self.arrow)).eval()


def _answered(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with an answer; of a pair it is the one that is preferred."""
    return {**row, "completion": row["chosen"]} if "chosen" in row else dict(row)


def _with_all(base: Any, loras: dict[str, str]) -> Any:
    """The base model with every LoRA, by PEFT."""
    from peft import PeftModel

    names = list(loras)
    model = PeftModel.from_pretrained(base, loras[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(loras[name], adapter_name=name)
    return model
