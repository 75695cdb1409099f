"""Stacked LoRA experts.

Shape suffixes: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from moelora.config import ExpertsConfig


class ExpertStack(nn.Module):
    """One factor of all experts of a mixture as a single parameter `weight`.

    All experts are in one tensor so that every one is in the graph at each step: an expert that got no token has a zero
    gradient rather than none, which data-parallel wrappers need. It is a module, not an entry of a `ParameterDict`,
    because hot-swapping and TRL look for the adapter's name between dots in a parameter's name.

    Args:
        *shape: [E, R, D] for A, [E, O, R] for B.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))

    def extra_repr(self) -> str:
        """The shape."""
        return ", ".join(map(str, self.weight.shape))


def init_a(stack_ERD: ExpertStack, config: ExpertsConfig) -> None:
    """Start A as `ExpertsConfig.init` says, each expert as LoRA would start alone."""
    if config.init == "normal":
        nn.init.normal_(stack_ERD.weight, std=config.init_std)
        return
    # kaiming_uniform_ on the flat [E * R, D] has the fan-in of one expert's [R, D]
    nn.init.kaiming_uniform_(stack_ERD.weight.data.flatten(0, 1), a=math.sqrt(5))


def init_b(stack_EOR: ExpertStack) -> None:
    """Start B at zero, so that the adapter changes nothing before training."""
    nn.init.zeros_(stack_EOR.weight)


def lora_parameter_count(num_experts: int, r: int, in_features: int, out_features: int) -> int:
    """Parameters of A and B of all experts on one linear."""
    return num_experts * r * (in_features + out_features)
