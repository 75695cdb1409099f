"""Small adapters on the tiny models of conftest, and views of a model to compare before and after."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moelora import MoeLoraConfig, fit_centroids
from tests.conftest import tiny_batch, tiny_model

# A few experts of a small, odd rank; dropout off, so that two passes are equal in training mode too.
SMALL: dict[str, dict[str, Any]] = {
    "mixlora": {"r": 3, "num_experts": 4, "top_k": 2, "lora_dropout": 0.0},
    "mixlora_dynamic": {"r": 3, "num_experts": 4, "top_p": 0.6, "lora_dropout": 0.0},
    "mixlora_switch": {"r": 3, "num_experts": 4, "capacity": 3, "router_jitter": 0.0, "lora_dropout": 0.0},
    "sira": {"r": 3, "num_experts": 4, "top_k": 2},
    "smora": {"r": 5, "top_k": 2},
    "molora": {"r": 3, "num_experts": 4},
    "adamole": {"r": 3, "num_experts": 4, "lora_dropout": 0.0},
    "adamole_fixed": {"r": 3, "num_experts": 4, "lora_dropout": 0.0},
    "hydralora": {"r": 3, "num_experts": 4, "lora_dropout": 0.0},
    "random_router": {"r": 3, "num_experts": 4, "top_k": 2, "lora_dropout": 0.0},
    "lora": {"r": 3},
}
# What is not on all tiny models alike: experts by layer, or that are no low-rank factors.
SMALL_OTHERS: dict[str, dict[str, Any]] = {
    "moelora_task": {"r": 8, "num_experts": 4, "num_tasks": 3, "task_features": 5, "lora_dropout": 0.0},
    "mixdora": {"r": 3, "num_experts": 4, "top_k": 2, "lora_dropout": 0.0},
    "llava_mole": {"r": 3, "lora_alpha": 6, "num_experts": 4, "lora_dropout": 0.0},
    "loramoe": {"r": 3, "num_experts": 4, "lora_dropout": 0.0},
    "poly": {"r": 3, "num_experts": 4, "num_tasks": 3},
    "mhr": {"r": 3, "num_experts": 3, "num_tasks": 3, "num_splits": 2},
    "mola": {"r": 3, "num_experts": [2, 4], "lora_dropout": 0.0},
    "mov": {"num_experts": 4},
    "soft_moa": {"num_adapters": 3, "slots": 2, "bottleneck": 5},
    "smore": {"r": 2, "sizes": [3, 4], "fan_out": [2, 3], "key_features": 5},
    "mixphm": {"num_experts": 3, "reduction": 3, "rank": 2},
    "mixda": {"num_adapters": 2, "reduction": 4, "gate_size": 7, "gate_depth": 2, "gate_dropout": 0.0},
    "mpoe": {"r": 3, "num_experts": 4, "ends": 3, "lora_dropout": 0.0},
    "graphmoe": {"r": 3, "lora_alpha": 6, "num_experts": 4, "state_features": 5, "lora_dropout": 0.0},
    "thor": {"r": 3, "num_experts": 3, "lora_dropout": 0.0},
    "perft_r": {"r": 3, "num_experts": 3, "top_k": 2, "lora_dropout": 0.0},
    "perft_e": {"r": 3, "num_experts": 4, "lora_dropout": 0.0},
    "perft_d": {"r": 3, "num_experts": 2, "lora_dropout": 0.0},
    "perft_s": {"r": 3, "lora_dropout": 0.0},
    "mor1e": {"rows": 2, "columns": 3, "num_centroids": 5},
    "mos": {"r": 3, "shards": 2, "lora_dropout": 0.0},
}
BY_TASK = ("moelora_task", "poly", "mhr")
"""Presets whose batches need `task_ids`."""
BASES: dict[str, str] = {"perft_r": "mixtral", "perft_e": "olmoe", "perft_d": "qwen3_moe", "perft_s": "mixtral"}
BASES |= {"soft_moa": "bert", "mixda": "bert"}
"""The tiny model of presets that do not fit a Llama."""
PRESETS = tuple(SMALL)
BLOCK_PRESETS = ("mixlora", "mixlora_dynamic", "mixlora_switch", "random_router")
# Weights that do not sum to one scale a whole block: the words with which B = 0 is the base model all the same.
KEEPS_BASE: dict[str, dict[str, Any]] = {
    "mixlora_dynamic": {"renormalize": True},
    "mixlora_switch": {"num_experts": 1, "capacity": None},
}
SMALL |= SMALL_OTHERS
FAMILY = tuple(SMALL)
ROUTED = tuple(preset for preset in PRESETS if preset != "lora")


def task_type(model: str) -> str:
    """PEFT's task type of a tiny model."""
    return {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}.get(model, "CAUSAL_LM")


def small_config(preset: str, model: str = "llama", **words: Any) -> MoeLoraConfig:
    """A small configuration of a preset for a tiny model."""
    return MoeLoraConfig.from_preset(preset, **{"task_type": task_type(model), **SMALL[preset], **words})


def prepare(model: Any, adapter_name: str = "default") -> Any:
    """Give an adapter what its method fits before training, if it does."""
    if getattr(model.peft_config[adapter_name].scores, "fitted", True):
        return model
    examples = [{"input_ids": ids.tolist()} for ids in torch.arange(3, 93).view(10, 9)]
    fit_centroids(model, examples, adapter_name=adapter_name)
    return model


def shake(model: nn.Module, seed: int = 0) -> None:
    """Give every tensor of every adapter a value of its own, as training would; B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "moelora_" in name:
            std = 0.02 if name.endswith(".bias") else 0.2
            if name.endswith(".omega") or ".moelora_gate." in name:
                std = 0.005  # what stands times 100 in a sigmoid
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)


def base_of(preset: str) -> str:
    """The tiny model that a preset fits."""
    return BASES.get(preset, "llama")


def adapted(preset: str, model: str = "llama", *, adapter_name: str = "default", seed: int = 0, **words: Any) -> Any:
    """A tiny model in eval mode with an adapter that changes its outputs."""
    peft_model = get_peft_model(tiny_model(model), small_config(preset, model, **words), adapter_name=adapter_name)
    prepare(peft_model, adapter_name)
    shake(peft_model, seed)
    return peft_model.eval()


@torch.no_grad()
def outputs(model: nn.Module, name: str = "llama", **kwargs: Any) -> Tensor:
    """Logits of the tiny batch."""
    logits: Tensor = model(**{**tiny_batch(name), **kwargs}).logits
    return logits


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers of all adapters."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "moelora_" in name}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What adding and removing an adapter could leave behind: classes, hooks, trainability, modes, attributes."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "parameters": {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "attributes": sorted(key for key in model.__dict__ if key != "model_tags"),
    }


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """The tuner layers by their name in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[name.removeprefix("base_model.model.")] = module
    return found


def adapted_linears(model: nn.Module) -> dict[str, tuple[str, Any, str]]:
    """The linears that a model's layers cover, by name: the layer's name, the layer, the role."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for path, layer in tuner_layers(model).items():
        for role in layer.linear_sizes():
            linear = layer.linear(role) if role else layer.get_base_layer()
            name = names[id(linear)].replace(".base_layer", "").removeprefix("base_model.model.")
            found[name] = path, layer, role
    return found


def stacks(layer: Any, role: str, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """A [E, R, in] and B [E, out, R] of an adapter's experts on a linear."""
    factors = layer.lora_factors(role, adapter)
    return factors.a_ERD, factors.b_EOR


def expert_tensors(layer: Any, adapter: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter's experts by their declared names."""
    parts = {first: part for first, part in layer.parts[adapter].items() if first != "router"}
    return {f"{first}.{name}": part.get_parameter(name) for first, part in parts.items() for name in part.declared}


def two_adapters() -> Any:
    """A model with a small and a larger MixLoRA adapter on different targets; "first" is active."""
    model = adapted("mixlora", adapter_name="first")
    model.add_adapter(
        "second", small_config("mixlora", num_experts=6, r=2, top_k=3, target_modules=["up_proj", "q_proj"])
    )
    shake(model, seed=7)
    return model.eval()


def train_steps(model: Any, name: str = "llama", steps: int = 2) -> None:
    """A few optimizer steps, which also move smora's biases."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(**tiny_batch(name, seed=step)).loss.backward()
        optimizer.step()
    model.eval()


def assert_equal_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


def gradients(model: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the sum of the model's own losses: all forwards first, then one backward pass."""
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches or (tiny_batch(),)]
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same parameters have a gradient, and it is the same up to rounding."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=f"{name}: {{}}".format)


def router_biases(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Copies of the biases that smora moves."""
    ending = f"moelora_router.{adapter_name}.bias"
    return {name: bias.detach().clone() for name, bias in model.named_parameters() if name.endswith(ending)}
