"""What every test shares: a closed world (no network, one thread, fixed seeds, poisoned memory) and tiny models."""

from __future__ import annotations

import gc
import os
import tempfile

from tests.hub_server import HubServer

# The whole session talks to a Hub on loopback: no test can reach the real one, with or without a network, and the real
# client is tested as it is. huggingface_hub reads these once, at import, hence before any other import.
HUB = HubServer()
_cache = tempfile.TemporaryDirectory(prefix="moelora-tests-")
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_TOKEN": HUB.token,
    "HF_HUB_CACHE": f"{_cache.name}/hub",
    "HF_DATASETS_CACHE": f"{_cache.name}/datasets",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "0",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    # Tiny models run faster on one thread, and two workers of pytest-xdist share two cores. Children inherit it.
    "OMP_NUM_THREADS": "1",
}

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch.utils._device import _device_constructors

torch.set_num_threads(1)
# The device context compares functions by identity with a set it builds at first use: build it of the real ones.
_device_constructors()

VOCAB = 97
# No size is a power of two unless the architecture demands it, so that a swapped dimension cannot go unnoticed.
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD_DIM = {**_DECODER, "head_dim": 6}
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _HEAD_DIM),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_HEAD_DIM, "sliding_window": 16}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_HEAD_DIM, "sliding_window": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _HEAD_DIM),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_DECODER, "partial_rotary_factor": 1.0}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _DECODER),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": 36,
            "n_inner": 52,
            "n_layer": 2,
            "n_head": 6,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": 36,
            "d_ff": 52,
            "d_kv": 6,
            "num_layers": 2,
            "num_heads": 6,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        {
            "vocab_size": VOCAB,
            "hidden_size": 36,
            "intermediate_size": 52,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "max_position_embeddings": 64,
            "num_labels": 3,
            "pad_token_id": 0,
        },
    ),
}
MODEL_NAMES = tuple(_MODELS)
# Mixtures of experts of their own, for presets that go beside them.
_MOE = {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_MODELS |= {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**_MOE, "norm_topk_prob": False}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_MOE, "head_dim": 6, "norm_topk_prob": True}),
}
MOE_NAMES = tuple(name for name in _MODELS if name not in MODEL_NAMES)


def tiny_model(name: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """Make a tiny random model from its config, in eval mode; the same name and seed give the same weights.

    Args:
        name: One of `MODEL_NAMES`.
        seed: Seed of the weights; the global random state is left as it was.
        **overrides: Fields of the model's config to set.
    """
    config_class, model_class, fields = _MODELS[name]
    config = getattr(transformers, config_class)(**{**fields, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, model_class)(config).eval()


def tiny_batch(name: str = "llama", *, batch_size: int = 3, length: int = 11, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make a batch for `tiny_model(name)`: right-padded, every row of another length, with labels.

    Args:
        name: One of `MODEL_NAMES`.
        batch_size: Number of sequences.
        length: Length of the first, longest sequence; each further one is two tokens shorter, and has one at least.
        seed: Seed of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (batch_size, length), generator=generator)
    lengths = torch.tensor([max(1, length - 2 * row) for row in range(batch_size)])
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    input_ids = input_ids * attention_mask
    labels = torch.arange(batch_size) % 3 if name == "bert" else input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pytest_collection_finish() -> None:
    """Keep what is imported and collected out of the garbage collection: going through it was a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory that nobody has written hold NaN, so that reading it fails instead of passing by luck."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The loopback Hub that the whole session talks to, empty."""
    HUB.reset()
    yield HUB
    HUB.reset()
