"""What the finished cells of a comparison say, in numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.compare.cells import BASE, Board, Cell, selection_cells
from eval.scoring.judging import is_at_floor
from eval.scoring.model_scores import ModelScores
from eval.scoring.scores import Score, difference, macro, mean
from eval.scoring.suite_tables import check_comparable
from moelora.errors import RunError


@dataclass
class MethodSummary:
    """All seeds of a method.

    Args:
        key: Of the method; "base" for the base model.
        title: Its name in tables.
        wanted: Seeds that are asked for.
        seeds: Scores of the finished seeds, by seed.
        against: Key of the method that tables compare it with; None for the reference.
        answers_with_one: See `Regime.answers_with_one`.
    """

    key: str
    title: str
    wanted: list[int] = field(default_factory=list)
    seeds: dict[int, ModelScores] = field(default_factory=dict)
    against: str | None = None
    answers_with_one: bool = True

    @property
    def active(self) -> int | None:
        """Its parameters that are active per token; None where they are not counted."""
        found: int = self.first.parameters["active"]
        return found if self.answers_with_one else None

    @property
    def first(self) -> ModelScores:
        """Any of its scores, for what all seeds have in common."""
        return next(iter(self.seeds.values()))

    def at(self, seed: int) -> ModelScores:
        """Its scores of a seed; the base model has the same under every one."""
        return self.first if self.key == BASE else self.seeds[seed]

    def rows(self, label: str, seeds: Sequence[int] | None = None) -> list[float]:
        """The value of each row of a task, mean over some seeds; None for all of them."""
        found = [self.at(seed).tasks[label].values for seed in (self.seeds if seeds is None else seeds)]
        return [sum(values) / len(values) for values in zip(*found, strict=True)]

    def by_seed(self, labels: Sequence[str], seeds: Sequence[int] | None = None) -> list[float]:
        """The mean over tasks of each of some seeds; None for all of them."""
        chosen = [self.at(seed) for seed in (self.seeds if seeds is None else seeds)]
        return [macro([each.tasks[label].score for label in labels]).value for each in chosen]

    def at_floor(self, label: str) -> bool:
        """Whether its mean is no better than always giving the most frequent answer."""
        return is_at_floor(mean(self.rows(label)).value, self.first.tasks[label].majority)

    def training(self, word: str) -> float | None:
        """Mean over the seeds of a number that the trainer noted."""
        found = [each.extra["training"].get(word) for each in self.seeds.values() if each.extra.get("training")]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None

    def learned(self) -> float | None:
        """Mean over tasks and seeds of the score right after the task was learnt; None if they come all at once."""
        found = [each.extra["training"].get("learned") for each in self.seeds.values() if each.extra.get("training")]
        means = [sum(map(statistics.fmean, of_tasks.values())) / len(of_tasks) for of_tasks in found if of_tasks]
        return statistics.fmean(means) if means else None

    def chosen(self) -> dict[str, float] | None:
        """Where a router by sequence sends prompts, as shares: to their `own` expert, and `foreign_at_base`."""
        found = [each.extra["chosen"] for each in self.seeds.values() if each.extra.get("chosen")]
        if not found:
            return None
        shares = {"own": statistics.fmean(statistics.fmean(each["own"].values()) for each in found)}
        if all("foreign_at_base" in each for each in found):
            shares["foreign_at_base"] = statistics.fmean(each["foreign_at_base"] for each in found)
        return shares


@dataclass
class Summary:
    """All that is finished.

    Args:
        methods: In the order of the table; the base first, methods without a finished seed left out.
        labels: Of all tasks.
        seen: Labels of the tasks that were trained on.
        reference: Key of the LoRA of equal trainable parameters, which the others are compared with; None without one.
        trials: Method to learning rate to the loss of the right answers, or the share of right ones on reasoning-gym;
            None where the training came to no number.
        trial_seconds: What the trials took.
        done: Number of finished cells.
        total: Number of cells.
        missing: Ids of cells that are not finished.
    """

    methods: list[MethodSummary]
    labels: list[str]
    seen: list[str]
    reference: str | None
    trials: dict[str, dict[float, float | None]]
    trial_seconds: float
    done: int
    total: int
    missing: list[str]

    @property
    def unseen(self) -> list[str]:
        """Labels of the tasks that nothing was trained on."""
        return [label for label in self.labels if label not in self.seen]

    @property
    def has_floors(self) -> bool:
        """Whether there is a most frequent answer that could be given to some task."""
        return any(task.majority is not None for task in self.methods[0].first.tasks.values())

    def method(self, key: str) -> MethodSummary | None:
        """A method by its key, if any seed of it is finished."""
        return next((method for method in self.methods if method.key == key), None)

    def compared_with(self, method: MethodSummary) -> MethodSummary | None:
        """The method that a table compares one with: another, of which a seed of this one is finished, too."""
        other = self.method(method.against or self.reference or "")
        return other if other is not None and other is not method and _common_seeds(method, other) else None

    def seed_variance(self, labels: Sequence[str]) -> float | None:
        """Variance of a mean over tasks from seed to seed, pooled over the methods that have several seeds."""
        groups = [each.by_seed(labels) for each in self.methods if len(each.seeds) > 1]
        degrees = sum(len(group) - 1 for group in groups)
        if not degrees:
            return None
        return sum(statistics.variance(group) * (len(group) - 1) for group in groups) / degrees

    def score(self, method: MethodSummary, labels: Sequence[str]) -> Score:
        """The unweighted mean over tasks, each the mean over its rows and the method's seeds.

        Its standard error has two parts: the rows that happened to be asked, and the seeds that happened to be drawn;
        see `_with_seeds`.
        """
        score = macro([mean(method.rows(label)) for label in labels])
        if method.key == BASE:
            return score
        return self._with_seeds(score, method.by_seed(labels), self.seed_variance(labels))

    def difference(self, ours: MethodSummary, theirs: MethodSummary, labels: Sequence[str]) -> Score:
        """Mean difference of two methods over the seeds that both have, paired by rows and by seeds.

        Seeds that only one has would compare other orders of the tasks, or of the rows. The standard error has the two
        parts of `score`; two methods that share nothing have twice the pooled variance, and the base model has none.
        """
        seeds = _common_seeds(ours, theirs)
        gap = macro([difference(ours.rows(label, seeds), theirs.rows(label, seeds)) for label in labels])
        pairs = zip(ours.by_seed(labels, seeds), theirs.by_seed(labels, seeds), strict=True)
        pooled = self.seed_variance(labels)
        drawn = sum(each.key != BASE for each in (ours, theirs))
        return self._with_seeds(gap, [a - b for a, b in pairs], None if pooled is None else drawn * pooled)

    @staticmethod
    def _with_seeds(score: Score, by_seed: Sequence[float], pooled: float | None) -> Score:
        """A score whose standard error counts the seeds, too.

        The variance from seed to seed is the larger of two: the pooled one, since that of few seeds may be small by
        chance, and from three seeds on its own, since methods do differ in it. What rows and seeds have together is in
        both parts of the error. So it is on the safe side twice.

        Args:
            score: Of the mean over seeds, with the error of the rows.
            by_seed: Its value for each seed.
            pooled: The variance of methods on average; None if it is not known.
        """
        own = statistics.variance(by_seed) if len(by_seed) > 2 else 0.0
        return Score(score.value, math.sqrt(score.stderr**2 + max(own, pooled or 0.0) / len(by_seed)), score.n)


def _common_seeds(ours: MethodSummary, theirs: MethodSummary) -> list[int]:
    """The seeds that both have; the base model has any."""
    if theirs.key == BASE:
        return list(ours.seeds)
    return [seed for seed in theirs.seeds if ours.key == BASE or seed in ours.seeds]


def summarize(board: Board) -> Summary | None:
    """Read all finished cells; None if there is not one with scores.

    Raises:
        RunError: If cells were not scored on the same rows by the same protocol, or methods of one seed were not
            trained on the same rows in the same order.
    """
    config = board.config
    cells = board.cells()
    finished = [cell for cell in cells if board.is_finished(cell)]
    methods = {BASE: MethodSummary(BASE, "base", [0])}
    for key, method in config.methods.items():
        methods[key] = MethodSummary(
            key, method.title, method.seeds, against=method.against, answers_with_one=method.regime.answers_with_one
        )
    for cell in finished:
        if cell.kind != "select":
            methods[cell.method or BASE].seeds[cell.seed] = board.read_scores(cell)
    present = [method for method in methods.values() if method.seeds]
    if not present:
        return None
    check_comparable([scores for method in present for scores in method.seeds.values()])
    _check_rows(present)
    labels = list(present[0].first.tasks)
    done = {cell.id for cell in finished}
    return Summary(
        methods=present,
        labels=labels,
        seen=labels
        if config.has_skills
        else [label for label, key in _keys(labels).items() if key in config.data.tasks],
        reference=_plain_lora(board),
        trials=_trials(board, finished),
        trial_seconds=sum(board.read_json(cell)["seconds"] for cell in finished if cell.kind == "select"),
        done=len(done),
        total=len(cells),
        missing=[cell.id for cell in cells if cell.id not in done],
    )


def _check_rows(methods: Sequence[MethodSummary]) -> None:
    """Refuse methods of one seed that were trained on other rows or in another order."""
    seen: dict[int, tuple[str, str]] = {}
    for method in methods:
        for seed, scores in method.seeds.items():
            training: dict[str, Any] = scores.extra.get("training") or {}
            if not training:
                continue
            found = training["rows_sha256"]
            other, before = seen.setdefault(seed, (method.key, found))
            if found != before:
                raise RunError(
                    f"{method.key} and {other} of seed {seed} were not trained on the same rows in the same order, so "
                    "they cannot stand in one table. Remove the result that is out of date."
                )


def _keys(labels: Sequence[str]) -> dict[str, str]:
    from eval.suites.registry import COMMONSENSE

    return dict(zip(labels, COMMONSENSE, strict=True))


def _plain_lora(board: Board) -> str | None:
    for key, method in board.config.methods.items():
        plain = (method.adapter or {}).get("peft") == "lora" and method.regime.kind == "together"
        if plain and method.equal == "trainable":
            return key
    return None


def _trials(board: Board, finished: Sequence[Cell]) -> dict[str, dict[float, float | None]]:
    found: dict[str, dict[float, float | None]] = {}
    for cell in selection_cells(board.config):
        if cell in finished and cell.learning_rate is not None:
            content = board.read_json(cell)
            value = None if "diverged" in content else content.get("exact", content["loss"])
            found.setdefault(cell.method, {})[cell.learning_rate] = value
    return found
