"""What methods are trained for on tasks of reasoning-gym, and what of them is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from eval.scoring.losses import BATCH, row_losses
from eval.scoring.own_tasks import TaskResult, solved, training_row
from moelora.compose import mean_loss
from moelora.compose.tokens import batches, tokenize
from moelora.errors import RunError
from moelora.runs.config import RunConfig
from moelora.runs.generated import wrong_answer
from moelora.runs.tasks import Problem, Verifier

_WRONG = "wrong_answer"


@dataclass(frozen=True)
class Measure:
    """One way to train and to score; the kinds differ in the class constants and methods.

    Attributes:
        recipe: The recipe that trains.
        metric: What tables call a score.
        trained: What the loss is, as pages say it.
        scored: What a score is a share of, as pages say it.
        chosen: What learning rates are chosen by, as pages say it; `{n}` is a number of problems.
        chosen_by: The same, as trials note it.

    Args:
        run: The tasks as a run has them.
        tokenizer: Of the base model.
        batch_size: Problems at once.
    """

    recipe: ClassVar[str]
    metric: ClassVar[str]
    trained: ClassVar[str]
    scored: ClassVar[str]
    chosen: ClassVar[str]
    chosen_by: ClassVar[str]

    run: RunConfig
    tokenizer: Any
    batch_size: int

    @staticmethod
    def trainer_class() -> Callable[..., Any]:
        """The class of the trainer."""
        raise NotImplementedError

    def prepare(self, task: TaskResult, key: str) -> None:
        """Complete the problems of a task with what they are scored by.

        Args:
            task: The problems.
            key: The key of the configuration that says how many there are, for messages.
        """

    def asked(self, task: TaskResult) -> Any:
        """What two models must have been asked alike, as JSON takes it."""
        return task.prompts

    def floor(self, task: TaskResult) -> float | None:
        """What a model scores that always gives the most frequent answer; None where it gives none."""
        raise NotImplementedError

    def values(self, model: Any, task: TaskResult) -> list[float]:
        """1 for each problem that a model is right about, else 0."""
        raise NotImplementedError

    def trial(self, model: Any, task: TaskResult) -> tuple[float, float]:
        """Of a learning rate: the share of the problems that a model is right about, and the loss behind it."""
        raise NotImplementedError

    def _rows(self, problems: Sequence[Problem]) -> list[dict[str, list[int]]]:
        """Problems with their answers, tokenised as in training."""
        return tokenize([training_row(each, self.run, self.tokenizer) for each in problems], self.tokenizer)


@dataclass(frozen=True)
class Answers(Measure):
    """Supervised fine-tuning on right answers; a problem is right where the greedy answer is."""

    recipe: ClassVar[str] = "sft"
    metric: ClassVar[str] = "exact"
    trained: ClassVar[str] = "loss on the answers alone"
    scored: ClassVar[str] = "fresh problems that reasoning-gym's verifier accepts"
    chosen: ClassVar[str] = (
        "Exact answers in percent to {n} problems of each task that are neither trained on nor scored, mean over the "
        "tasks, after a whole training; the most are taken, of equals the lower loss."
    )
    chosen_by: ClassVar[str] = "exact answers"

    @staticmethod
    def trainer_class() -> Callable[..., Any]:
        """The trainer of runs."""
        from train.sft import RunTrainer

        return RunTrainer

    def floor(self, task: TaskResult) -> float | None:
        """See `Measure.floor`."""
        return task.majority

    def values(self, model: Any, task: TaskResult) -> list[float]:
        """See `Measure.values`."""
        return solved(model, self.tokenizer, task, self.run, batch_size=self.batch_size)

    def trial(self, model: Any, task: TaskResult) -> tuple[float, float]:
        """See `Measure.trial`; the loss is that of the right answers, mean over their tokens.

        The two need not agree: a lower rate may have the lower loss and still answer fewer problems.
        """
        values = self.values(model, task)
        loss = mean_loss(model, batches(self._rows(task.problems), BATCH, model.device))
        return sum(values) / len(values), loss


@dataclass(frozen=True)
class Preferences(Measure):
    """Direct preference optimisation (arXiv 2305.18290) on pairs of a right and a wrong answer to each problem.

    A problem is right where the right answer is more likely than the wrong one: `log p(right) > log p(wrong)`, each a
    sum over the tokens of the answer and of the end of the turn. It asks the model itself, without a reference, so that
    the base has a score, too.
    """

    recipe: ClassVar[str] = "dpo"
    metric: ClassVar[str] = "preferred"
    trained: ClassVar[str] = (
        "DPO on a right and a wrong answer to each problem, against the model as it was when the training began"
    )
    scored: ClassVar[str] = "fresh problems whose right answer is more likely than the wrong one (a coin has 50)"
    chosen: ClassVar[str] = (
        "Preferred right answers in percent of {n} problems of each task that are neither trained on nor scored, mean "
        "over the tasks, after a whole training; the most are taken, of equals the lower mean of -log sigmoid(log "
        "p(right) - log p(wrong))."
    )
    chosen_by: ClassVar[str] = "preferred answers"

    @staticmethod
    def trainer_class() -> Callable[..., Any]:
        """TRL's trainer with the balance losses."""
        from moelora import MoeLoraDPOTrainer

        return MoeLoraDPOTrainer

    def floor(self, task: TaskResult) -> float | None:
        """None: there is no answer to give."""
        return None

    def values(self, model: Any, task: TaskResult) -> list[float]:
        """See `Measure.values`."""
        return [float(margin > 0) for margin in self.margins(model, task)]

    def trial(self, model: Any, task: TaskResult) -> tuple[float, float]:
        """See `Measure.trial`; the loss is `-log sigmoid(margin)`, mean over the problems."""
        margins = self.margins(model, task)
        losses = [max(-margin, 0.0) + math.log1p(math.exp(-abs(margin))) for margin in margins]
        return sum(margin > 0 for margin in margins) / len(margins), sum(losses) / len(losses)

    def prepare(self, task: TaskResult, key: str) -> None:
        """Note a wrong answer with each problem.

        Raises:
            RunError: If one is not to be had.
        """
        verifier = Verifier(task.task, (self.run.dataset.tasks or {})[task.task])
        try:
            wrong = [wrong_answer(verifier, task.problems, index) for index in range(len(task.problems))]
        except RunError as error:
            raise RunError(
                f"data.tasks.{task.task}: all {len(task.problems)} problems have the same right answer, and pairs need "
                f"a wrong one; give the task options with more variety, or raise {key}."
            ) from error
        task.problems = [
            replace(problem, entry={**problem.entry, _WRONG: answer})
            for problem, answer in zip(task.problems, wrong, strict=True)
        ]

    def asked(self, task: TaskResult) -> Any:
        """Prompts and wrong answers."""
        return [task.prompts, [problem.entry[_WRONG] for problem in task.problems]]

    def margins(self, model: Any, task: TaskResult) -> list[float]:
        """`log p(right) - log p(wrong)` of each problem, in nats."""
        wrong = [replace(problem, answer=problem.entry[_WRONG]) for problem in task.problems]
        rows = self._rows([*task.problems, *wrong])
        sums = [
            loss * sum(label != -100 for label in row["labels"][1:])
            for loss, row in zip(row_losses(model, rows, self.batch_size), rows, strict=True)
        ]
        return [b - a for a, b in zip(sums[: len(wrong)], sums[len(wrong) :], strict=True)]


MEASURES: dict[str, type[Measure]] = {kind.recipe: kind for kind in (Answers, Preferences)}
"""The ways by the recipe that trains."""
