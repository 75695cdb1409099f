"""MixLoRA's forward against the authors' own package, PyPI `mixlora` 0.2.3, which is used for nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora.layers.feed_forward import MixtureFeedForward
from tests.adapters import outputs, shake, small_config, stacks, tuner_layers
from tests.conftest import tiny_batch, tiny_model

mixlora = pytest.importorskip("mixlora")

ACTIVATIONS = {
    "llama": "silu",
    "gemma2": "gelu_pytorch_tanh",
    "qwen2": "silu",
    "mistral": "silu",
    "phi": "gelu_new",
    "phi3": "silu",
}
WORDS: dict[str, dict[str, Any]] = {
    "all linears": {},
    # their code renormalises a single weight to 1, which moelora refuses to train
    "top-1": {"top_k": 1, "renormalize": True, "inference_mode": True},
    "all experts": {"top_k": 4},
    "rslora": {"use_rslora": True},
    "no down": {"exclude_modules": ["down_proj", "fc2"]},
    "no attention": {"exclude_modules": r".*self_attn.*"},
}


def their_config(model: Any, name: str) -> Any:
    """The file that their `adapter_config.json` would be for our adapter."""
    config = model.peft_config["default"]
    names = {path.rpartition(".")[-1] for path, layer in tuner_layers(model).items() if not layer.moelora_router}
    for layer in tuner_layers(model).values():
        if isinstance(layer, MixtureFeedForward):
            names |= {child for role, child in layer.form.linears.items() if layer.lora_factors(role, "default")}
    theirs = mixlora.MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "tiny",
            "task_type": "CAUSAL_LM",
            "peft_type": "MIXLORA",
            "routing_strategy": "mixlora",
            "r": config.experts.r,
            "lora_alpha": config.experts.lora_alpha,
            "lora_dropout": 0.05,  # it takes no 0
            "use_rslora": config.experts.use_rslora,
            "target_modules": sorted(names),
            "num_experts": config.experts.num_experts,
            "top_k": config.selection.k,
            "act_fn": ACTIVATIONS[name],
        }
    )
    theirs.adapter_name_ = "default"
    theirs.dtype_ = torch.float32
    return theirs.check()


def their_weights(model: Any) -> dict[str, Tensor]:
    """Our adapter's weights under their names."""
    weights: dict[str, Any] = {}
    for path, layer in tuner_layers(model).items():
        path = path.replace("model.layers.", "mixlora.layers.")
        if isinstance(layer, MixtureFeedForward):
            weights[f"{path}.moe_gate.weight"] = layer.moelora_router["default"].weight
            for role, child in layer.form.linears.items():
                if layer.lora_factors(role, "default") is None:
                    continue
                for factor, stack in zip("AB", stacks(layer, role), strict=True):
                    for expert, matrix in enumerate(stack):
                        weights[f"{path}.{child}.experts.{expert}.lora_{factor}.weight"] = matrix
        else:
            for factor, stack in zip("AB", stacks(layer, ""), strict=True):
                weights[f"{path}.lora_{factor}.weight"] = stack[0]
    return {key: value.detach().clone() for key, value in weights.items()}


def their_model(model: Any, name: str) -> Any:
    """The same base with the same adapter in their code."""
    theirs = tiny_model(name)
    mixlora.inject_adapter_in_model(theirs, their_config(model, name), their_weights(model))
    # their experts are in plain dicts, which eval() does not reach
    theirs.eval()
    for layer in theirs.model.layers:
        for moe in layer.mlp.mixlora_moes.values():
            for expert in moe.experts_.values():
                expert.eval()
    return theirs


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_equals_the_authors_code(name: str, words: str) -> None:
    config = small_config("mixlora", name, lora_alpha=3, **WORDS[words])
    model = get_peft_model(tiny_model(name), config).eval()
    shake(model)
    theirs = their_model(model, name)
    base = outputs(tiny_model(name), name)
    expected, actual = outputs(theirs, name), outputs(model, name)
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    # and each block alone, on tokens that are spread widely
    for index, layer in enumerate(theirs.model.layers):
        x = torch.randn(2, 7, 36, generator=torch.Generator().manual_seed(index))
        ours = tuner_layers(model)[f"model.layers.{index}.mlp"]
        with torch.no_grad():
            torch.testing.assert_close(ours(x), layer.mlp(x), atol=1e-5, rtol=1e-5)


def test_generated_tokens_equal_the_authors_code() -> None:
    model = get_peft_model(tiny_model(), small_config("mixlora")).eval()
    shake(model)
    ids = tiny_batch(batch_size=2, length=6)["input_ids"].clamp_min(3)
    words = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(input_ids=ids, **words), their_model(model, "llama").generate(ids, **words))
