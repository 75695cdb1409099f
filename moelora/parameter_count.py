"""How many parameters a configuration would train on a model, without touching the model."""

from __future__ import annotations

from torch import nn

from moelora.config import MoeLoraConfig
from moelora.experts.stack import lora_parameter_count
from moelora.inject.base_modules import base_modules
from moelora.inject.besides import count_besides
from moelora.inject.plan import plan_sites
from moelora.layers.modules import linear_size


def count_trainable_parameters(model: nn.Module, config: MoeLoraConfig) -> int:
    """What `MoeLoraConfig.num_trainable_parameters` returns.

    Raises:
        TargetError: If the configuration does not fit the model.
    """
    planned = MoeLoraConfig(**{**config.to_dict(), "target_modules": config.target_modules})
    sites = plan_sites(model, planned)
    modules = dict(base_modules(model))
    experts, routing = planned.experts, planned.routing
    total = 0
    for site in sites.values():
        num_experts = experts.num_experts if site.routed else 1
        sizes = {role: linear_size(modules[name]) for role, name in site.linears.items()}
        for role in site.roles:
            total += lora_parameter_count(num_experts, experts.r, *sizes[role])
        if site.routed and routing.trainable:
            total += num_experts * sizes["up" if site.form else ""][0]
    return total + count_besides(model, modules, planned, sites)
