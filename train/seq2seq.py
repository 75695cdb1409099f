"""Fine-tuning of an encoder-decoder such as T5: the encoder reads the prompt, the decoder writes the completion.

A row has `prompt` and `completion`, both texts. The loss is the cross-entropy of the completion's tokens.
"""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorForSeq2Seq

from moelora import MoeLoraSeq2SeqTrainer
from moelora.runs.config import RunConfig
from train import sft


class TextTrainer(MoeLoraSeq2SeqTrainer):
    """A `MoeLoraSeq2SeqTrainer` of rows of `prompt` and `completion`."""

    def __init__(self, *, model: Any, train_dataset: Any, processing_class: Any, **words: Any) -> None:
        def encode(row: dict[str, Any]) -> dict[str, Any]:
            answer = processing_class(text_target=row["completion"])["input_ids"]
            if answer[-1] != processing_class.eos_token_id:  # not every tokenizer adds it
                answer = [*answer, processing_class.eos_token_id]
            return {**processing_class(row["prompt"]), "labels": answer}

        super().__init__(
            model=model,
            train_dataset=train_dataset.map(encode, remove_columns=["prompt", "completion"], desc=None),
            processing_class=processing_class,
            data_collator=DataCollatorForSeq2Seq(processing_class, model=model),
            **words,
        )


def run(config: RunConfig, *, restart: bool = False) -> None:
    """Train what `config` says; see `train.sft.run`."""
    sft.run(config, restart=restart, trainer_class=TextTrainer)
