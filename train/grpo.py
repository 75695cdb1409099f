"""Group-relative policy optimisation (https://huggingface.co/papers/2402.03300): answers that earn a reward.

The model writes several answers to each prompt, and learns towards those with more reward than their group's mean. The
reward of a reasoning-gym task is its verifier's score, from 0 to 1; of other rows, which have `prompt` and `answer`, it
is 1 for that answer. With `beta` above 0 the KL divergence from the model at the start is in the loss; at the first
step it is 0. transformers generates; vLLM is refused, since a routed mixture cannot be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from moelora import MoeLoraGRPOTrainer
from moelora.errors import RunError
from moelora.runs.config import DatasetConfig, RunConfig, adapter_config
from moelora.runs.tasks import Verifier, problems
from train import sft


def run(config: RunConfig, *, restart: bool = False) -> None:
    """Train what `config` says; see `train.sft.run`.

    Raises:
        RunError: If the adapter routes by the task: answers are generated without it.
    """
    if sft.reads_tasks(adapter_config(config)):
        raise RunError(
            f"adapter.preset {config.adapter.get('preset')!r} routes or balances by the task, and GRPO generates "
            "answers without it; allowed: a preset that routes by the text."
        )
    trainer = partial(MoeLoraGRPOTrainer, reward_funcs=[reward_of(config.dataset)])
    sft.run(config, restart=restart, trainer_class=trainer)


def reward_of(config: DatasetConfig) -> Callable[..., list[float]]:
    """The reward of answers to the rows of a data set, as TRL calls it.

    Args:
        config: The data set.
    """
    verifiers = {task: Verifier(task, options) for task, options in (config.tasks or {}).items()}
    known = {
        (task, problem.prompt): problem
        for task, options in (config.tasks or {}).items()
        for problem in problems(task, options, seed=config.seed, size=config.rows_per_task)
    }

    def verified(prompts: list[Any], completions: list[Any], task: list[str], **columns: Any) -> list[float]:
        """The score of reasoning-gym's verifier."""
        return [
            verifiers[each].score(known[each, _last_text(prompt)], _last_text(completion))
            for prompt, completion, each in zip(prompts, completions, task, strict=True)
        ]

    def exact(prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        """1 for the row's answer."""
        pairs = zip(completions, answer, strict=True)
        return [float(_last_text(found).strip() == wanted.strip()) for found, wanted in pairs]

    return verified if config.tasks else exact


def _last_text(messages: Any) -> str:
    """A text, or the last message of a chat."""
    return messages if isinstance(messages, str) else str(messages[-1]["content"])
