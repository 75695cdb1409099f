"""Classification of texts: a head in place of a language model's, on decoders and encoders.

A row has `text` and `label`, a text or a number. The classes are numbered in the order of the data set's own names, or
sorted; `training.json` lists them. The head starts at random and is trained and saved with the adapter.
"""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorWithPadding

from moelora import MoeLoraTrainer
from moelora.runs.config import RunConfig
from train import sft


class ClassificationTrainer(MoeLoraTrainer):
    """A `MoeLoraTrainer` of rows of `text` and `label`; the classes are those of the model's configuration."""

    def __init__(self, *, model: Any, train_dataset: Any, processing_class: Any, **words: Any) -> None:
        numbers = model.config.label2id

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            return {**processing_class(row["text"]), "labels": numbers[_name(train_dataset, row["label"])]}

        super().__init__(
            model=model,
            train_dataset=train_dataset.map(encode, remove_columns=["text", "label"], desc=None),
            processing_class=processing_class,
            data_collator=DataCollatorWithPadding(processing_class),
            **words,
        )


def run(config: RunConfig, *, restart: bool = False) -> None:
    """Train what `config` says; see `train.sft.run`."""
    sft.run(config, restart=restart, trainer_class=ClassificationTrainer, model_words=_model_words)


def _model_words(rows: Any, tokenizer: Any) -> dict[str, Any]:
    """The classes, and the padding before which a decoder's head reads the last token."""
    names = getattr(rows.features["label"], "names", None) or [str(label) for label in sorted(set(rows["label"]))]
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "pad_token_id": tokenizer.pad_token_id,
    }


def _name(rows: Any, label: str | int) -> str:
    """The name of a class; data sets of the Hub keep names beside the numbers of their classes."""
    names = getattr(rows.features["label"], "names", None)
    return str(label) if names is None else str(names[int(label)])
