"""FSDP and ZeRO-3: which adapters they can shard, and what has to be read of the base before that."""

from __future__ import annotations

from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from moelora.config import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.fingerprint import fingerprint
from moelora.layers.base import MoeLoraLayer
from moelora.routing.prompts import is_derived
from moelora.routing.run import RunHooks


def refuse_zero_3() -> None:
    """Refuse DeepSpeed's ZeRO-3, which gathers the parameters of a module while that module runs.

    A mixture multiplies by weights of linears that it does not call, and keeps them for the backward pass.

    Raises:
        ConfigError: If it is on.
    """
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "zero_optimization.stage is 3: ZeRO-3 gathers a module's parameters only while that module runs, and a "
            "mixture reads the weights of linears that it does not call; allowed: stage 1 or 2, or FSDP2, which "
            "gathers whole decoder layers."
        )


def prepare_sharding(model: Any, hooks: RunHooks) -> None:
    """Get a model with adapters ready for FSDP, before it cuts the parameters into shards.

    The fingerprint of the base is taken now: an adapter is saved by one process, which has no whole weights then.

    Args:
        model: The model, whole.
        hooks: Its hooks.

    Raises:
        ConfigError: If an active adapter has what FSDP would leave in shards: it gathers the parameters of a decoder
            layer while that layer runs, and at no other time.
    """
    for layer in hooks.layers:
        for adapter in set(layer.active_adapters) & layer.configs.keys():
            reason = _never_whole(layer, adapter)
            if reason is not None:
                raise ConfigError(
                    f"adapter {adapter!r} cannot be trained under FSDP, which gathers the parameters of a layer only "
                    f"while it runs: {reason}. Allowed: data parallelism (torchrun without FSDP), or an adapter "
                    "without that."
                )
    found = fingerprint(model)
    for config in model.peft_config.values():
        if isinstance(config, MoeLoraConfig):
            config.base_fingerprint = found or config.base_fingerprint


def _never_whole(layer: MoeLoraLayer, adapter: str) -> str | None:
    """What a layer does with parameters that are in shards then; None if nothing."""
    config, parts, router = layer.configs[adapter], layer.parts[adapter], layer.routers.get(adapter)
    moving = [choice.kind for choice in config.balance if choice.moves_bias]
    if router is not None and moving:
        return f"balance {moving[0]!r} moves the routers' biases after the layers have run"
    if router is not None and any(map(is_derived, config.needs)):
        return f"scores {config.scores.kind!r} read embeddings of the base before it runs"
    held_elsewhere = router is not None and "router" not in parts and next(router.parameters(), None) is not None
    if any(part.elsewhere for part in parts.values()) or (held_elsewhere and config.placement.routers == "per_model"):
        return f"{layer.name!r} uses tensors that another layer holds"
    return None
