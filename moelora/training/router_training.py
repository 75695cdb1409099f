"""How routers are trained beside the experts: a learning rate of their own, later and more slowly at first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from moelora.errors import ConfigError
from moelora.routing.router import Router
from moelora.validation import check, is_index, is_real

_MARK = "moelora_router"
"""The key by which a group of parameters says that it holds routers; optimizers keep and save it."""


@dataclass(frozen=True, kw_only=True)
class RouterTraining:
    """What is different for the tensors of routers (all that a mixture's scores and selection declare) in training.

    Given to a trainer as `router_training`. Routers then are in parameter groups of their own, whatever made the
    optimizer: the trainer, or `peft.optimizers.create_loraplus_optimizer`. Nothing is kept in the trainer: the rates
    and the number of steps are in the checkpoint's optimizer and scheduler, so that a resumed run goes on with them.

    MixDA (ACL 2023), for one, trains its gate at twice the rate of its adapters.

    Args:
        learning_rate: The rate of the routers; None is that of the group that they would be in. The trainer's schedule
            multiplies it as any other.
        frozen_steps: In the first so many optimizer steps the rate of the routers is 0.
        warmup_steps: In the next so many it grows in equal steps, to its full value in the last of them. Both
            multiply the trainer's own schedule.

    Raises:
        ConfigError: For a value out of range.
    """

    learning_rate: float | None = None
    frozen_steps: int = 0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        rate = self.learning_rate
        check(
            rate is None or (is_real(rate) and rate >= 0),
            "router_training.learning_rate",
            rate,
            "a number of at least 0, or None",
        )
        for name in ("frozen_steps", "warmup_steps"):
            value = getattr(self, name)
            check(is_index(value), f"router_training.{name}", value, "an integer of at least 0")

    def factor(self, step: int) -> float:
        """What the routers' rate is multiplied by in an optimizer step; 0 is the first."""
        trained = step + 1 - self.frozen_steps
        return min(1.0, max(0, trained) / max(1, self.warmup_steps))

    def split(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Move the routers of a model into parameter groups of their own; nothing if they are in such already.

        A group of them has the settings of the one that they were in. It comes after all others, whose first is the
        one that a trainer logs the rate of.

        Args:
            optimizer: An optimizer that has not taken a step.
            model: The model.

        Raises:
            ConfigError: If it trains no router of the model, or has taken steps.
        """
        if any(group.get(_MARK) for group in optimizer.param_groups):
            return
        routers = {id(parameter) for parameter in router_parameters(model)}
        found = [[p for p in group["params"] if id(p) in routers] for group in optimizer.param_groups]
        if not any(found):
            raise ConfigError(
                f"router_training is {self}, but the optimizer has no tensor of a router; allowed: None for a model "
                "whose routers are not trained."
            )
        if optimizer.state:
            raise ConfigError("router_training needs an optimizer that has not taken a step; this one has.")
        groups = list(optimizer.param_groups)
        for group, own in zip(groups, found, strict=True):
            if not own:
                continue
            group["params"] = [p for p in group["params"] if id(p) not in routers]
            rate = group["lr"] if self.learning_rate is None else self.learning_rate
            words = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
            optimizer.add_param_group({**words, "params": own, "lr": rate, _MARK: True})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    def schedule(self, scheduler: Any) -> None:
        """Let a scheduler multiply the rate of routers by `factor` too; nothing if it does, or that is 1 in every step.

        Args:
            scheduler: A scheduler of an optimizer after `split`.

        Raises:
            ConfigError: If it is no `LambdaLR`, which transformers' schedules by step are.
        """
        if not self.frozen_steps and not self.warmup_steps:
            return
        if not isinstance(scheduler, LambdaLR):
            raise ConfigError(
                f"router_training.frozen_steps and warmup_steps multiply a schedule by step, and the trainer has a "
                f"{type(scheduler).__name__}; allowed: a LambdaLR, as the lr_scheduler_type of most names is."
            )
        for index, group in enumerate(scheduler.optimizer.param_groups):
            before = scheduler.lr_lambdas[index]
            if group.get(_MARK) and getattr(before, "func", None) is not _product:
                of_step = partial(_product, before, self.factor)
                scheduler.lr_lambdas[index] = of_step
                group["lr"] = scheduler.base_lrs[index] * of_step(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _product(first: Callable[[int], float], second: Callable[[int], float], step: int) -> float:
    return first(step) * second(step)


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all routers in a model, trained or not."""
    found: Iterable[Router] = (module for module in model.modules() if isinstance(module, Router))
    return [parameter for router in found for parameter in router.parameters()]


def router_rate(optimizer: Any) -> float | None:
    """The rate of the routers' first group now; None if they have no group of their own."""
    return next((float(group["lr"]) for group in optimizer.param_groups if group.get(_MARK)), None)
