"""Tiny dense models of every row of the map, with adapters, saved; and what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from moelora import MoeLoraConfig
from tests import forked
from tests.adapters import shake, small_config
from tests.conftest import VOCAB, tiny_model

_SMALL = {**tiny_model("llama").config.to_dict(), "architectures": None, "model_type": None, "dtype": None}
_WORDS = {
    key: _SMALL[key]
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
}
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [2.0, 3.0, 4.0],
}


def _granite() -> Any:
    words = {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.7,
    }
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**_WORDS, **words))


ROWS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model("llama", rms_norm_eps=1e-3, rope_parameters=_LLAMA_3),
    "smollm2": lambda: tiny_model("llama", tie_word_embeddings=True),
    "llama_wide_heads": lambda: tiny_model("llama", head_dim=8),
    "llama_attention_bias": lambda: tiny_model("llama", attention_bias=True, head_dim=8),
    "mistral": lambda: tiny_model("mistral", sliding_window=5, head_dim=8),
    "qwen2": lambda: tiny_model("qwen2"),
    "qwen2_tied_windows": lambda: tiny_model(
        "qwen2", tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: tiny_model("qwen3", attention_bias=True),
    "qwen3_window": lambda: tiny_model("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=0),
    "granite": _granite,
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**_WORDS)),
    "phi3": lambda: tiny_model("phi3", sliding_window=7),
    "phi3_long": lambda: tiny_model(
        "phi3", rope_parameters=_LONG, max_position_embeddings=64, original_max_position_embeddings=32
    ),
}
"""Tiny bases of every row of the map, and of its special cases, by name."""

TARGETS = {
    "llama": "MixtralForCausalLM",
    "smollm2": "MixtralForCausalLM",
    "llama_wide_heads": "MixtralForCausalLM",
    "llama_attention_bias": "GraniteMoeForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen2_tied_windows": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
    "qwen3_window": "Qwen3MoeForCausalLM",
    "granite": "GraniteMoeForCausalLM",
    "olmo2": "FlexOlmoForCausalLM",
    "phi3": "MixtralForCausalLM",
    "phi3_long": "MixtralForCausalLM",
}


def make_base(row: str = "llama") -> Any:
    """A base whose every weight matters: biases are not 0, norms not 1."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = ROWS[row]().eval()
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    return model


def save_pair(folder: Path, row: str = "llama", preset: str = "mixlora", **words: Any) -> PeftModel:
    """Save a base in `folder / "base"` and an adapter on it in `folder / "adapter"`.

    Returns:
        The model with the adapter.
    """
    base = make_base(row)
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, small_config(preset, row, **{"lora_alpha": 4, **words})).eval()
    shake(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # what is trained beside the adapter's own layers
            if parameter.requires_grad and "moelora_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    # the embedding is saved because it was asked for, not since PEFT cannot tell whether it was resized
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return model


def save_with_choices(folder: Path, row: str = "llama", **choices: Any) -> PeftModel:
    """As `save_pair`, with choices of a mixlora adapter replaced."""
    words: dict[str, Any] = {
        "experts": {"kind": "lora", "num_experts": 4, "r": 3, "lora_alpha": 4},
        "placement": "feed_forward",
        "task_type": "CAUSAL_LM",
        **choices,
    }
    base = make_base(row)
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, MoeLoraConfig(**words)).eval()
    shake(model)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return model


def input_ids() -> Tensor:
    """Tokens that are longer than any window."""
    return torch.randint(3, VOCAB, (3, 19), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def observed(model: Any) -> dict[str, Tensor]:
    """Logits, and the tokens that follow when the likeliest is taken each time."""
    ids = input_ids()
    greedy = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=8, max_new_tokens=8
    )
    return {"logits": model(input_ids=ids).logits, "greedy": greedy}


_SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        greedy = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=8, max_new_tokens=8
        )
        logits = model(input_ids=ids).logits
    save_file({"logits": logits, "greedy": greedy.contiguous()}, folder + ".observed")
    print(folder, type(model).__name__, model.num_parameters())
"""


def observed_without_moelora(*folders: Path) -> dict[Path, tuple[str, int, dict[str, Tensor]]]:
    """Class, number of parameters, logits and greedy tokens of exported models in a process that has no moelora."""
    arguments = [json.dumps(input_ids().tolist()), *map(str, folders)]
    printed = forked.run(_SCRIPT, *arguments, folder=folders[0].parent, without=["moelora", "peft"])
    found = {}
    for line in printed.splitlines():
        folder, name, count = line.rsplit(" ", 2)
        found[Path(folder)] = name, int(count), load_file(f"{folder}.observed")
    return found
