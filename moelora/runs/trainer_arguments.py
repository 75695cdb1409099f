"""The arguments of a recipe's trainer from the words of a YAML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

from moelora.errors import RunError
from moelora.runs.recipes import RECIPES
from moelora.runs.wording import one_line
from moelora.validation import check_keys


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
    return parsed
