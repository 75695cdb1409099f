"""The router of one mixture: scores, then activation.

Shape suffixes: B sequences, S tokens of a sequence, T = B * S, D input features, E experts, K chosen experts of a
token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moelora.config import RoutingConfig
from moelora.routing.activations import renormalize, top_k_choice, within_capacity
from moelora.routing.decision import Routing
from moelora.routing.scores import router_logits, scores_from_logits


class Router(nn.Module):
    """Routes tokens to experts as a `RoutingConfig` says.

    The linear is `weight` [E, D] without bias: a parameter, or a saved buffer if the config freezes it. With
    `bias_update_rate` there is a saved fp32 buffer `bias` [E] that is added to the scores and moved by `update_bias`.

    Args:
        in_features: D.
        num_experts: E.
        config: The routing axis.
    """

    def __init__(self, in_features: int, num_experts: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        weight = torch.empty(num_experts, in_features)
        if config.trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(num_experts) if config.bias_update_rate > 0 else None)
        self.bias_of_last_forward: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weight; see `RoutingConfig.init_std`."""
        if self.config.init_std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=self.config.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # A cast of the model to half precision must not reach the bias: steps of 1e-5 would be rounded away.
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias is not None and self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        self.bias_of_last_forward = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to another recorder, which would not know that it has to set this back
        return {**self.__dict__, "bias_of_last_forward": None}

    def forward(self, x_TD: Tensor, valid_BS: Tensor) -> Routing:
        """Route each token.

        Args:
            x_TD: Tokens, of any floating dtype.
            valid_BS: True where a token is not padding; gives the sequences for the capacity.

        Returns:
            The decision, in fp32.
        """
        config = self.config
        logits_TE = router_logits(x_TD, self.weight)
        scores_TE, probs_TE = scores_from_logits(logits_TE, config.score)
        if self.bias is not None:
            scores_TE = scores_TE + self._bias_for_this_run(self.bias)
        kept_TE = None
        if self.training and config.expert_dropout > 0:
            kept_TE = (torch.rand_like(scores_TE) >= config.expert_dropout) / (1 - config.expert_dropout)
            scores_TE = scores_TE * kept_TE
        sums_to_one = config.renormalize and config.capacity_factor is None and config.expert_dropout == 0
        if config.top_k is None:
            weights_TE = renormalize(scores_TE) if config.renormalize else scores_TE
            return Routing(logits_TE, probs_TE, weights_TE, ids_TK=None, sums_to_one=sums_to_one)
        weights_TK, ids_TK = top_k_choice(scores_TE, config.top_k)
        assigned_TK = kept_TE.gather(-1, ids_TK) > 0 if kept_TE is not None else None
        if config.renormalize:
            positive = config.score == "softmax" and self.bias is None and kept_TE is None
            weights_TK = renormalize(weights_TK, positive)
        if config.capacity_factor is not None and (self.training or config.capacity_in_eval):
            kept_TK = within_capacity(ids_TK, probs_TE.shape[-1], config.capacity_factor, valid_BS, assigned_TK)
            weights_TK = weights_TK * kept_TK
        return Routing(logits_TE, probs_TE, weights_TK, ids_TK, assigned_TK, sums_to_one)

    def _bias_for_this_run(self, bias_E: Tensor) -> Tensor:
        """The bias, or its value before the last step when checkpointing repeats the forward that led to that step."""
        if torch.is_grad_enabled() and self.training and self.bias_of_last_forward is not None:
            return self.bias_of_last_forward
        return bias_E

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """`bias += u * sign(mean(load) - load)`: raise the experts that got fewer tokens than the mean (SMoRA).

        The recorder calls it at the end of a training forward, and sets `bias_of_last_forward` to None when the next
        one starts.

        Args:
            load_E: Tokens each expert got in one training forward, summed over all processes.
        """
        if self.bias is None:
            return
        self.bias_of_last_forward = self.bias
        # a new tensor, since the old one may still be needed by the backward pass
        self.bias = self.bias + self.config.bias_update_rate * torch.sign(load_E.mean() - load_E)

    def __repr__(self) -> str:
        config, (num_experts, in_features) = self.config, self.weight.shape
        routing: dict[str, Any] = {"score": config.score, "top_k": config.top_k, "trainable": config.trainable}
        words = ", ".join(f"{key}={value}" for key, value in routing.items())
        return f"{type(self).__name__}(in_features={in_features}, num_experts={num_experts}, {words})"
