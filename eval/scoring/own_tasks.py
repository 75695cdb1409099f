"""Answers to problems of a run's own tasks: fresh ones of reasoning-gym, scored by its verifiers, or the user's rows.

Rows are right where the answer is theirs, letter for letter but for white space around it. Texts have no answers: what
is measured of them is their loss.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from eval.scoring.generation import RoutingCounts, answer, shared_tokens
from eval.scoring.judging import majority_share
from eval.scoring.losses import BATCH, Example, row_losses
from eval.scoring.routing import TokenView, chosen_by_task, has_routers, token_views
from eval.scoring.scores import mean
from eval.scoring.sources import BESIDE, Contestant
from moelora import batch_facts
from moelora.compose.tokens import tokenize
from moelora.errors import RunError
from moelora.runs.config import RunConfig
from moelora.runs.data import chat_prompt, load_rows
from moelora.runs.tasks import Problem, fresh_problems, task_data_set

ROWS = "rows"
"""What rows are called that do not say their task."""
TEXT_LENGTH = 1024
"""Tokens of a text that are trained on where the run does not say: trl.SFTConfig's own max_length."""
# Tokens from which on answers take long.
_LONG = 256


@dataclass
class TaskResult:
    """What the models answered to the problems of a task.

    Args:
        task: Name of the task.
        problems: The problems.
        dropped: Problems left out because a training row has the same prompt.
        majority: Share of the most frequent reference answer: what a model scores that always says the same; None for
            texts, which have no answers.
        prompts: Token ids of the prompts, or of the texts.
        examples: Of rows, their tokens with labels; empty for problems of reasoning-gym.
        task_id: The number of the task in training, for an adapter that routes by it; None where that is not known.
        answers: Model to its answers.
        scores: Model to the verifier's scores from 0 to 1.
        losses: Model to the loss of each row's answer, or of each text, in nats per token; empty without `examples`.
    """

    task: str
    problems: list[Problem]
    dropped: int
    majority: float | None
    prompts: list[list[int]]
    examples: Sequence[Example] = ()
    task_id: int | None = None
    answers: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def exact(self, model: str) -> list[float]:
        """1 for each problem that the verifier gives its full score, else 0."""
        return [float(score >= 1.0) for score in self.scores[model]]


@dataclass
class OwnResults:
    """Results of the suite.

    Args:
        tasks: One for each task.
        models: Names in the order of the tables; the last is the adapter that the evaluation is about.
        routing: Task to the routing of its questions' tokens, in two halves; empty if nothing was routed.
        views: What single tokens of a few questions do, where something is routed.
        chosen: Task to how many of its questions went to each expert, by name, where a router decides once for a text.
        seconds: Model to the wall time of loading it and answering.
    """

    tasks: list[TaskResult]
    models: list[str]
    routing: dict[str, list[RoutingCounts]] = field(default_factory=dict)
    views: list[TokenView] = field(default_factory=list)
    chosen: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def has_losses(self) -> bool:
        """Whether the problems are rows, whose answers have a loss."""
        return any(task.losses for task in self.tasks)

    @property
    def has_answers(self) -> bool:
        """Whether something is asked; of texts it is not."""
        return all(task.majority is not None for task in self.tasks)


def make_problems(config: RunConfig, tokenizer: Any, limit: int | None = None) -> list[TaskResult]:
    """Fresh problems of every task of the run, none of which is among the training rows.

    Args:
        config: The run.
        tokenizer: Makes the prompts, as in training.
        limit: Problems per task; None takes `evaluation.rows_per_task`.

    Raises:
        RunError: If the run was not trained on reasoning-gym tasks, or a task has no fresh problems.
    """
    data, wish = config.dataset, limit or config.evaluation.rows_per_task
    if not data.tasks:
        raise RunError(
            "this run was not trained on reasoning-gym tasks (`dataset.tasks`), and none of its rows were kept from "
            "training (`dataset.held_out`), so it has no problems of its own; say what to score it on: --data with "
            "rows that it has not seen, --suite commonsense, --suite reasoning, or tasks of lm-eval."
        )
    seen = {_question(row["prompt"]) for row in load_rows(data, tokenizer)}
    results = []
    for number, (task, options) in enumerate(data.tasks.items()):
        problems, dropped = fresh_problems(task, options, seed=config.evaluation.seed, size=wish, seen=seen)
        if not problems:
            raise RunError(
                f"task {task!r} has no problem that is not among the training rows: it has too few for its options "
                f"{options}. Give it options with more variety, or lower dataset.rows_per_task."
            )
        majority = majority_share([problem.answer for problem in problems])
        prompts = [_encode(tokenizer, problem.prompt, config) for problem in problems]
        results.append(TaskResult(task, problems, dropped, majority, prompts, task_id=number))
    return results


def problems_of_rows(
    rows: Any, tokenizer: Any, numbers: Sequence[str], limit: int | None = None, longest: int | None = TEXT_LENGTH
) -> list[TaskResult]:
    """Rows of the user's as problems, task by task.

    Args:
        rows: What `load_rows` gave, with a column `task` or of one task.
        tokenizer: Makes the prompts, as in training.
        numbers: The tasks of training in their order, for an adapter that routes by their number.
        limit: Rows per task; None takes all.
        longest: Tokens of a text that count, as in training; None counts all.

    Raises:
        RunError: If some rows have a prompt to answer and others have none.
    """
    tasks = list(map(str, rows["task"])) if "task" in rows.column_names else [ROWS] * len(rows)
    chosen = {
        task: rows.select([index for index, each in enumerate(tasks) if each == task][:limit])
        for task in sorted(set(tasks))
    }
    tokens = {task: tokenize(own, tokenizer) for task, own in chosen.items()}
    asked = [bool(_prompt(example)) for examples in tokens.values() for example in examples]
    if any(asked) and not all(asked):
        raise RunError(
            f"{asked.count(True)} of {len(asked)} rows have a prompt, and the others have none; allowed: all or none. "
            "Score them apart."
        )
    results = []
    for task, own in chosen.items():
        examples = tokens[task]
        number = numbers.index(task) if task in numbers else None
        if not any(asked):
            end = tokenizer.eos_token_id if "text" in rows.column_names else None  # a chat's template writes its own
            examples = [_as_trained(example, end, longest) for example in examples]
            problems = [Problem(task, tokenizer.decode(example["input_ids"]), "", entry={}) for example in examples]
            texts = [example["input_ids"] for example in examples]
            results.append(TaskResult(task, problems, 0, None, texts, examples, number))
            continue
        prompts = [_prompt(example) for example in examples]
        answers = [tokenizer.decode(_answer(example), skip_special_tokens=True).strip() for example in examples]
        problems = [
            Problem(task, _question_of(row), answer, entry={}) for row, answer in zip(own, answers, strict=True)
        ]
        results.append(TaskResult(task, problems, 0, majority_share(answers), prompts, examples, number))
    return results


def _as_trained(text: Example, end: int | None, longest: int | None) -> dict[str, list[int]]:
    """The tokens of a text that are trained on: with its end, and no more of them than `longest`."""
    ids = list(text["input_ids"])
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    return {"input_ids": ids[:longest], "labels": ids[:longest]}


def _prompt(example: Example) -> list[int]:
    """The tokens before the answer."""
    labels = example.get("labels") or []
    return list(example["input_ids"])[: next((i for i, label in enumerate(labels) if label != -100), len(labels))]


def _answer(example: Example) -> list[int]:
    """The tokens that are taught, with what the chat template puts around the row's own words."""
    return [label for label in example.get("labels") or [] if label != -100]


def _question_of(row: Mapping[str, Any]) -> str:
    """The last words of a row's prompt."""
    return _question(row["prompt"]) if "prompt" in row else str(row["messages"][-2]["content"])


def _question(prompt: Any) -> str:
    """The text of a row's prompt, which may be a chat."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _is_chat(config: RunConfig, tokenizer: Any) -> bool:
    """Whether a run's prompts become chats."""
    return tokenizer.chat_template is not None if config.dataset.chat is None else config.dataset.chat


def _encode(tokenizer: Any, question: str, config: RunConfig, earlier: Sequence[Problem] = ()) -> list[int]:
    """A prompt's tokens, made as TRL made those of the training rows; after the turns of problems solved earlier."""
    if not _is_chat(config, tokenizer):
        return list(tokenizer(question)["input_ids"])
    turns = [
        turn
        for each in earlier
        for turn in ({"role": "user", "content": each.prompt}, {"role": "assistant", "content": each.answer})
    ]
    (*system, last) = chat_prompt(question, config.dataset.system)
    messages = [*system, *turns, last]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def ask_after(tasks: Sequence[TaskResult], turns: int, config: RunConfig, tokenizer: Any) -> None:
    """Put solved problems of other tasks before each problem: a conversation that goes from one task to another.

    Before problem i of a task come problems i of the `turns` tasks after it (the first comes after the last), with
    their reference answers. What is scored, and how, stays.

    Args:
        tasks: The problems; their prompts are made anew.
        turns: How many, at most one of each other task.
        config: The run that they are of.
        tokenizer: Makes the prompts.

    Raises:
        RunError: If prompts are no chats.
    """
    if not _is_chat(config, tokenizer):
        raise RunError(
            "earlier turns need prompts that are chats; the model has no chat template, or dataset.chat is off."
        )
    for number, task in enumerate(tasks):
        others = [tasks[(number + 1 + turn) % len(tasks)].problems for turn in range(turns)]
        task.prompts = [
            _encode(tokenizer, problem.prompt, config, [each[i % len(each)] for each in others])
            for i, problem in enumerate(task.problems)
        ]


def training_row(problem: Problem, config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """A problem with its answer in the form of a training row.

    Args:
        problem: The problem.
        config: The run.
        tokenizer: Of its model.
    """
    if not _is_chat(config, tokenizer):
        return {"prompt": problem.prompt, "completion": problem.answer}
    completion = [{"role": "assistant", "content": problem.answer}]
    return {"prompt": chat_prompt(problem.prompt, config.dataset.system), "completion": completion}


def run(
    config: RunConfig,
    contestants: Sequence[Contestant],
    tasks: list[TaskResult],
    tokenizer: Any,
    batch_size: int | None = None,
    earlier: OwnResults | None = None,
) -> OwnResults:
    """Let every contestant answer the same problems.

    Args:
        config: The run.
        contestants: The models; the routing of those with routers is recorded, the last one's is kept.
        tasks: The problems.
        tokenizer: Of the base model.
        batch_size: Problems at once; None takes `evaluation.batch_size`.
        earlier: Results on the same problems, whose base model is not scored again.

    Raises:
        RunError: If a model cannot be loaded.
    """
    results = OwnResults(tasks, [contestant.name for contestant in contestants])
    for task in results.tasks:
        kind = ("rows" if results.has_answers else "texts") if task.examples else "fresh problems"
        note = f", {task.dropped} dropped because they occur in training" if task.dropped else ""
        print(f"{task.task}: {len(task.problems)} {kind}{note}", flush=True)
    longest = max(_longest(task, config, tokenizer) for task in tasks) if results.has_answers else 0
    if longest > _LONG:
        print(f"Answers may take {longest} tokens, as the longest row; evaluation.max_new_tokens caps it.", flush=True)
    for contestant in contestants:
        if contestant.role == BESIDE:
            contestant.load(config)  # one of another base is found before any time is spent
    shared = shared_tokens([prompt for task in results.tasks for prompt in task.prompts])
    for contestant in contestants:
        if earlier is not None and contestant.role == "base":
            _take_over(contestant.name, earlier, results)
            continue
        started = time.monotonic()
        model = contestant.load(config)
        # two halves of a task's prompts are compared
        comparable = all(len(task.problems) > 1 for task in results.tasks)
        routed = contestant.role == "adapter" and has_routers(model) and comparable and results.has_answers
        for task in results.tasks:
            began = time.monotonic()
            with facts_of(model, task, is_of_run=contestant.role != BESIDE):
                if task.examples:
                    task.losses[contestant.name] = row_losses(model, task.examples, batch_size or BATCH)
                    said = f"loss {mean(task.losses[contestant.name]).value:.3f}"
                if results.has_answers:
                    answers, halves = answer(
                        model,
                        tokenizer,
                        task.prompts,
                        batch_size=batch_size or config.evaluation.batch_size,
                        max_new_tokens=_longest(task, config, tokenizer),
                        shared=shared if routed else None,
                    )
                    task.answers[contestant.name] = answers
                    task.scores[contestant.name] = verify(task, config, answers)
                    said = f"{mean(task.exact(contestant.name)).value:.0%} exact"
                    if routed:
                        results.routing[task.task] = halves
            print(f"{contestant.name}  {task.task}  {said}  {time.monotonic() - began:.1f} s", flush=True)
        if routed:
            results.views = []
            for task in results.tasks:
                with facts_of(model, task, is_of_run=True):
                    results.views += token_views(model, tokenizer, {task.task: task.prompts})
        if contestant.role == "adapter":
            results.chosen = chosen_by_task(model, {task.task: task.prompts for task in results.tasks})
        results.seconds[contestant.name] = time.monotonic() - started
        del model
    return results


def _take_over(model: str, earlier: OwnResults, results: OwnResults) -> None:
    """Take what a model scored before on the same problems."""
    for now, before in zip(results.tasks, earlier.tasks, strict=True):
        now.answers |= _of(model, before.answers)
        now.scores |= _of(model, before.scores)
        now.losses |= _of(model, before.losses)
    results.seconds[model] = earlier.seconds[model]


def _of(model: str, values: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in values.items() if name == model}


def facts_of(model: Any, task: TaskResult, *, is_of_run: bool) -> AbstractContextManager[None]:
    """What an adapter that has a table of tasks has to know of a batch: the number that the task has in training.

    Args:
        model: The model.
        task: The task.
        is_of_run: Whether it was trained in the run whose tasks are numbered.

    Raises:
        RunError: If that is not known.
    """
    adapters = getattr(model, "peft_config", {}).values()
    if not any(hasattr(getattr(adapter, "scores", None), "num_tasks") for adapter in adapters):
        return nullcontext()
    if task.task_id is None or not is_of_run:
        raise RunError(
            f"the adapter routes by the task, and it is not known which number {task.task!r} had in training; allowed: "
            "the folder of its run, and rows whose column task has names of that run."
        )
    return batch_facts(task_ids=[task.task_id])


def room(task: TaskResult, tokenizer: Any) -> int:
    """Tokens for an answer: those of the longest reference, its end, and a little talk that must not cut it off."""
    if task.examples:
        return max(len(_answer(example)) for example in task.examples) + 4
    return max(len(tokenizer(problem.answer)["input_ids"]) for problem in task.problems) + 4


def _longest(task: TaskResult, config: RunConfig, tokenizer: Any) -> int:
    """The longest answer, in tokens."""
    return config.evaluation.max_new_tokens or room(task, tokenizer)


def solved(model: Any, tokenizer: Any, task: TaskResult, config: RunConfig, *, batch_size: int) -> list[float]:
    """1 for each problem that a model's greedy answer solves, else 0.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: The problems.
        config: The run that they are of.
        batch_size: Problems at once.
    """
    longest = _longest(task, config, tokenizer)
    answers, _ = answer(model, tokenizer, task.prompts, batch_size=batch_size, max_new_tokens=longest)
    return [float(score >= 1.0) for score in verify(task, config, answers)]


def verify(task: TaskResult, config: RunConfig, answers: Sequence[str]) -> list[float]:
    """Scores of the answers by reasoning-gym's verifier of the task; of rows 1 where it is the row's, else 0."""
    if task.examples:
        return [float(text.strip() == problem.answer) for text, problem in zip(answers, task.problems, strict=True)]
    options = (config.dataset.tasks or {})[task.task]
    verifier = task_data_set(task.task, options, seed=0, size=1)
    return [
        float(verifier.score_answer(text, problem.entry)) for text, problem in zip(answers, task.problems, strict=True)
    ]
