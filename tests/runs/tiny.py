"""A run that takes seconds: a tiny random Llama and a byte-level tokenizer in a folder, and a YAML file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import tiny_model

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

WORDS: dict[str, Any] = {
    "model": None,
    "dtype": "float32",
    "dataset": {
        "tasks": {"gcd": {"max_value": 30}, "letter_counting": {"min_words": 2, "max_words": 3}},
        "rows_per_task": 12,
        "system": "Reply.",
    },
    "adapter": {"preset": "mixlora", "r": 2, "lora_alpha": 4, "num_experts": 3, "top_k": 2},
    "training": {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "dataloader_pin_memory": False,
    },
    "evaluation": {"rows_per_task": 5, "batch_size": 5, "max_new_tokens": 3},
    "output_dir": None,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_folder(folder: Path) -> Path:
    """A folder that `from_pretrained` reads."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_run(folder: Path, **changes: Any) -> Path:
    """The YAML file of a run of a tiny model, in `folder`.

    Args:
        folder: Gets the model, the YAML file and the run.
        **changes: Top-level keys to replace.
    """
    words = {
        **copy.deepcopy(WORDS),
        "model": str(tiny_folder(folder / "model")),
        "output_dir": str(folder / "run"),
        **changes,
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(words))
    return file
