"""The recipes of `python -m train`: what rows each trains on, and whose fields the section `training` holds."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks of the configuration and of the rows; the program is `train/<name>.py`.

    Args:
        arguments: The class whose fields the section `training` holds.
        forms: The columns of a row; the first of these sets that the rows have.
        replies: Those of the columns that answer the prompt, and become an assistant's messages in a chat.
        task_type: PEFT's task type of the model that is trained.
    """

    arguments: str
    forms: tuple[tuple[str, ...], ...]
    replies: tuple[str, ...] = ()
    task_type: str = "CAUSAL_LM"

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that a row can have."""
        return (*dict.fromkeys(column for form in self.forms for column in form), "task")

    @property
    def is_chat(self) -> bool:
        """Whether a prompt becomes a chat where the tokenizer has a template."""
        return self.task_type != "SEQ_2_SEQ_LM" and any("prompt" in form for form in self.forms)

    def arguments_class(self) -> Any:
        """The class of `arguments`; it is imported here, since only TRL's recipes need TRL."""
        module, _, name = self.arguments.rpartition(".")
        with warnings.catch_warnings():
            # TRL says at the import that the place may change
            warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
            return getattr(importlib.import_module(module), name)


_TEXTS = (("prompt", "completion"), ("messages",), ("text",))
RECIPES = {
    "sft": Recipe("trl.SFTConfig", _TEXTS, ("completion",)),
    "sequential": Recipe("trl.SFTConfig", _TEXTS, ("completion",)),
    "dpo": Recipe("trl.DPOConfig", PAIRS, ("chosen", "rejected")),
    "kto": Recipe("trl.KTOConfig", (("prompt", "completion", "label"),), ("completion",)),
    "orpo": Recipe("trl.experimental.orpo.ORPOConfig", PAIRS, ("chosen", "rejected")),
    "grpo": Recipe("trl.GRPOConfig", (("prompt", "answer"),)),
    "reward": Recipe("trl.RewardConfig", PAIRS, ("chosen", "rejected"), "SEQ_CLS"),
    "seq2seq": Recipe(
        "transformers.Seq2SeqTrainingArguments", (("prompt", "completion"),), ("completion",), "SEQ_2_SEQ_LM"
    ),
    "classification": Recipe("transformers.TrainingArguments", (("text", "label"),), task_type="SEQ_CLS"),
}
