"""The arguments of a recipe's trainer from the words of a YAML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from moelora.errors import RunError
from moelora.runs.recipes import RECIPES
from moelora.runs.wording import one_line
from moelora.validation import check, check_keys, is_count, is_positive, is_real, is_seed


def trainer_arguments(recipe: str, words: dict[str, Any], output_dir: Path) -> Any:
    """The arguments of a recipe's trainer, such as an `SFTConfig`, with defaults that suit these programs.

    Args:
        recipe: The recipe.
        words: Their fields.
        output_dir: Folder of the checkpoints.

    Raises:
        MoeLoraError: If a field is unknown or its value is refused.
    """
    import torch
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:  # argparse would print its whole usage and exit
            raise RunError(f"training: {one_line(message.removeprefix('argument --'))}")

    ours = {
        "output_dir": "it is the run's output_dir",
        "model_init_kwargs": "use model_kwargs at the top level",
        "push_to_hub": "use `moelora push` once the run is done",
    }
    words = dict(words)
    for key, reason in ours.items():
        if key in words:
            raise RunError(f"training.{key} cannot be set: {reason}.")
    if words.get("use_vllm"):
        raise RunError(
            f"training.use_vllm is {words['use_vllm']!r}; allowed: false. vLLM is given the weights with the adapter "
            "merged into them, and a routed mixture cannot be merged, since it depends on its input."
        )
    arguments_class = RECIPES[recipe].arguments_class()
    fields = {f.name for f in dataclasses.fields(arguments_class) if f.init}
    check_keys("training", words, fields - set(ours))
    for name, value in words.items():
        if isinstance(value, float):
            check(math.isfinite(value), f"training.{name}", value, "a finite number")
    # transformers 5.23 warns at the old name, which TRL's own default still uses.
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if old in words:
            words.setdefault(old.replace("gradient", "activation"), words.pop(old))
    defaults = {
        "report_to": "none",
        # TRL recomputes activations by default, which costs a third of the speed.
        "activation_checkpointing": False,
        # TRL turns autocast on by default; here `dtype` and `adapter_dtype` say what is computed in what.
        "bf16": False,
        # transformers refuses bf16 on CPU unless told that CPU is meant.
        "use_cpu": not torch.accelerator.is_available(),
        "logging_steps": 5,
        "save_total_limit": 2,
    }
    parser = Parser((arguments_class,))
    parser.set_defaults_with_config(**{**defaults, **words}, output_dir=str(output_dir))
    try:
        (parsed,) = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, RunError) else RunError(f"training: {one_line(error)}") from error
    for name, (is_allowed, allowed) in _LIMITS.items():
        value = getattr(parsed, name, None)
        if value is not None:
            check(is_allowed(value), f"training.{name}", value, allowed)
    return parsed


def _at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: is_real(value) and value >= least, f"a number of at least {least:g}"


_POSITIVE: tuple[Callable[[Any], bool], str] = (is_positive, "a number above 0")
_COUNT: tuple[Callable[[Any], bool], str] = (is_count, "a whole number of at least 1")
_SEED: tuple[Callable[[Any], bool], str] = (is_seed, "a whole number of 0 to 4294967295")
# What transformers and TRL take and then fail on inside, or train nothing with; None is allowed where they have it.
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": (lambda value: value == -1 or is_count(value), "at least 1; -1 trains for num_train_epochs"),
    "num_train_epochs": _POSITIVE,
    "learning_rate": _POSITIVE,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_length": (lambda value: is_count(value) and value > 1, "at least 2, or null for no limit"),
    "seed": _SEED,
    "data_seed": _SEED,
    "warmup_steps": _at_least(0),
    "weight_decay": _at_least(0),
    "max_grad_norm": _at_least(0),
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_total_limit": _COUNT,
    "dataloader_num_workers": _at_least(0),
}
