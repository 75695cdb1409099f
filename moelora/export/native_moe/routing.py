"""What of an adapter's choices a native MoE can say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.export.native_moe.targets import Target

_EXPERTS = ("lora", "lora_shared_a")
"""Experts that are `W + scaling * B_e A_e`, with A and B as they are stored."""

_SELECTIONS = {
    "dense": "every token is sent to all experts, and a native MoE chooses K of them. Selection 'top_k' with k = "
    "num_experts is the same routing",
    "learned_threshold": "each token has a threshold of its own and any number of experts, and a native MoE chooses K",
}


@dataclass(frozen=True)
class MoeRouting:
    """The routing of a native MoE: softmax, the K largest, divided by their sum or not.

    Attributes:
        num_experts: E.
        top_k: K.
        renormalize: Whether the K weights are divided by their sum.
    """

    num_experts: int
    top_k: int
    renormalize: bool

    def words(self, target: Target) -> dict[str, Any]:
        """What the target's configuration says of it."""
        words = {target.num_experts: self.num_experts, "num_experts_per_tok": self.top_k}
        return {**words, "norm_topk_prob": self.renormalize} if target.norm_topk_prob else words


def read_routing(config: MoeLoraConfig, target: Target) -> MoeRouting:
    """The routing of an adapter in a native MoE's terms.

    Raises:
        ExportError: Names what the target cannot express.
    """
    check_choices(config)
    # the weights of all experts sum to one anyway
    renormalize = config.selection.renormalize or config.selection.k == config.experts.num_experts
    if not renormalize and not target.norm_topk_prob:
        raise _refusal(
            "selection with renormalize", False, "True", f"{target.architecture} always renormalises the chosen weights"
        )
    return MoeRouting(config.experts.num_experts, config.selection.k, renormalize)


def check_choices(config: MoeLoraConfig) -> None:
    """Refuse choices that no native MoE can express.

    What holds in training only (dropout of experts, a capacity, balance losses) does not matter.

    Raises:
        ExportError: Names the choice.
    """
    experts, scores, selection = config.experts, config.scores, config.selection
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ExportError(f"the adapter's task_type is {config.task_type!r}; allowed: 'CAUSAL_LM', or none.")
    if config.placement.kind != "feed_forward":
        raise _refusal(
            "placement", config.placement.kind, "'feed_forward'", "only whole feed-forward blocks are routed there"
        )
    if experts.kind not in _EXPERTS:
        raise _refusal("experts", experts.kind, "'lora', 'lora_shared_a'", "an expert there is W + scaling B A")
    if scores.kind != "linear":
        raise _refusal("scores", scores.kind, "'linear'", "the router there is one linear per block")
    if scores.activation != "softmax":
        raise _refusal("scores with activation", scores.activation, "'softmax'", "the scores there are a softmax")
    if scores.bias:
        raise _refusal("scores with bias", True, "False", "the router there is a linear without a bias")
    if selection.kind != "top_k":
        reason = _SELECTIONS.get(selection.kind, "the K highest scores are chosen there")
        raise _refusal("selection", selection.kind, "'top_k'", reason)
    if not selection.multiply_by_gate:
        raise _refusal("selection with multiply_by_gate", False, "True", "an expert is weighted by its score there")
    if selection.capacity_in_eval:
        raise _refusal("selection with capacity_in_eval", True, "False", "experts have no capacity there")


def _refusal(axis: str, value: object, allowed: str, reason: str) -> ExportError:
    return ExportError(
        f"the adapter's {axis} is {value!r}, which a native MoE cannot express: {reason}. Allowed: {allowed}."
    )
