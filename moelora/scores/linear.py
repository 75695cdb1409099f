"""Scores of one linear map, always in fp32.

Shape suffixes: T tokens, D input features, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moelora.autocast import autocast_dtype, no_autocast
from moelora.choices import Init, Param, Site, register
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.validation import check, check_bool, check_choice, is_index, is_real, is_share

Activation = Literal["softmax", "sigmoid"]

NOISE_FLOOR = 0.01
"""The least standard deviation of the noise, as in Tensor2Tensor's code."""


@register
@dataclass(frozen=True, kw_only=True)
class LinearScores(Scores):
    """`z = W_r x`, then a softmax over the experts or a sigmoid for each.

    Args:
        activation: "softmax" over the experts, or an independent "sigmoid" for each.
        trainable: Whether the router is trained. If not it keeps its initial weights, which are saved: a fixed random
            router.
        init_std: W_r starts at N(0, `init_std`); None is `nn.Linear`'s default (kaiming uniform).
        bias: Whether a bias is added to the scores. It starts at 0, has no gradient, and is moved by the balance choice
            "bias_update".
        bias_weighs: Whether that bias both selects and weighs (SMoRA, arXiv 2501.15103). If not it only selects, and
            the weights are the scores without it (DeepSeek-V3, arXiv 2412.19437, Eq. 13 to 16; arXiv 2408.15664).
        num_frozen: The rows of W_r of the first so many experts are not trained.
        jitter: In training each number that the router sees is multiplied by one drawn from U(1 - `jitter`,
            1 + `jitter`) (Switch, arXiv 2101.03961); the experts see what it was.
        noise: Whether the logits are noisy in training: `z_e + N(0, 1) (softplus(W_n x)_e + 0.01)`, with W_n learned
            from 0 (noisy top-k gating, Shazeer et al., arXiv 1701.06538, where W_r starts at 0 too; the 0.01 is that
            of Tensor2Tensor's code). Each token and expert has its own draw; the balance losses see the noisy logits.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "linear"

    activation: Activation = "softmax"
    trainable: bool = True
    init_std: float | None = 0.02
    bias: bool = False
    bias_weighs: bool = True
    num_frozen: int = 0
    jitter: float = 0.0
    noise: bool = False

    def __post_init__(self) -> None:
        check_choice("scores.activation", self.activation, Activation)
        check_bool("scores.trainable", self.trainable)
        check_bool("scores.bias", self.bias)
        check_bool("scores.bias_weighs", self.bias_weighs)
        check_bool("scores.noise", self.noise)
        check(self.bias or self.bias_weighs, "scores.bias_weighs", self.bias_weighs, "True without a bias")
        std = self.init_std
        check(std is None or (is_real(std) and std >= 0), "scores.init_std", std, "a number of at least 0, or None")
        check(is_share(self.jitter), "router_jitter", self.jitter, "0 <= router_jitter < 1")
        check(is_index(self.num_frozen), "scores.num_frozen", self.num_frozen, "an integer of at least 0")

    def check(self, config: Any) -> None:
        """Refuse frozen rows of more experts than there are, and beside a bias that all experts share in moving.

        And a bias that only selects where nothing is selected by a rank.

        Raises:
            ConfigError: With the reason.
        """
        num_experts = config.experts.num_experts
        check(self.num_frozen <= num_experts, "scores.num_frozen", self.num_frozen, f"0 to num_experts ({num_experts})")
        moves = any(choice.moves_bias for choice in config.balance)
        check(
            self.num_frozen == 0 or not moves,
            "scores.num_frozen",
            self.num_frozen,
            "0 with the balance choice 'bias_update'",
            "It would move the bias of the frozen experts as well.",
        )
        check(
            self.bias_weighs or config.selection.chooses_by_rank,
            "scores.bias_weighs",
            self.bias_weighs,
            f"True with {config.selection.kind!r} selection",
            "It chooses nothing by a rank, so that the bias would do nothing; use 'top_k'.",
        )

    @property
    def is_trained(self) -> bool:
        """Whether training moves the router."""
        return self.trainable

    def picked(self, experts: Sequence[int], num_experts: int) -> Self:
        """See `Choice.picked`."""
        return self.frozen(0)

    def frozen(self, num_experts: int) -> Self:
        """See `Choice.frozen`."""
        return replace(self, num_frozen=num_experts if self.trainable else 0)

    def new_rows(self, name: str, old: Tensor, count: int) -> Tensor | None:
        """The mean of the old rows: a logit between their smallest and their largest, for every token.

        A softmax does not see what all its logits have in common, so a row of zeros would mean nothing; the mean does
        not depend on it. A new expert is never the first choice before its row is trained.
        """
        known = name in ("weight", "bias", "noise_weight")
        return old.mean(0, keepdim=True).expand(count, *old.shape[1:]) if known else None

    def params(self, site: Site) -> list[Param]:
        """`weight` [E, D], `bias` [E] in fp32, and `noise_weight` [E, D]."""
        init = Init("kaiming") if self.init_std is None else Init("normal", self.init_std)
        weight = Param(
            "weight", (site.num_experts, site.router_features), init, self.trainable, num_frozen=self.num_frozen
        )
        bias = Param("bias", (site.num_experts,), Init("zeros"), trainable=False, dtype=torch.float32)
        noise = replace(weight, name="noise_weight", init=Init("zeros"))
        return [weight, *([bias] if self.bias else []), *([noise] if self.noise else [])]

    @property
    def is_distribution(self) -> bool:
        """With a softmax and no bias."""
        return self.activation == "softmax" and not self.bias

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`."""
        x_TD = given.x_TD
        if self.jitter > 0 and given.training:
            x_TD = x_TD.float()  # in half precision a factor this near to 1 would have few values
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TE = router_logits(x_TD, given.tensors["weight"])
        if self.noise and given.training:
            spread_TE = F.softplus(router_logits(x_TD, given.tensors["noise_weight"])) + NOISE_FLOOR
            logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE
        if self.activation == "softmax":
            scores_TE = probs_TE = logits_TE.softmax(-1)
        else:
            scores_TE = logits_TE.sigmoid()
            probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-9)
        if self.bias and not self.bias_weighs:
            softmax = self.activation == "softmax"
            return Scored(logits_TE, probs_TE, scores_TE, is_softmax=softmax, bias_E=given.tensors["bias"])
        if self.bias:
            return Scored(logits_TE, probs_TE, scores_TE + given.tensors["bias"], is_softmax=False)
        return Scored(logits_TE, probs_TE, scores_TE, is_softmax=self.activation == "softmax")


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x W_r^T` in fp32 whatever the dtypes, under autocast too: top-k flips on rounding errors of half precision."""
    if autocast_dtype(x_TD.device) is not None:
        with no_autocast(x_TD.device):
            return router_logits(x_TD, weight_ED)
    keeps_half = x_TD.dtype != torch.float32 and torch.is_grad_enabled()
    if not keeps_half or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return F.linear(x_TD.float(), weight_ED.float())
    return _LogitsOfHalf.apply(x_TD, weight_ED)


class _LogitsOfHalf(torch.autograd.Function):
    """The same with gradients, keeping the tokens in half precision: their fp32 copy is made again, not kept."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        wide_ED = weight_ED.float()
        ctx.weight_dtype = weight_ED.dtype
        ctx.save_for_backward(x_TD, wide_ED)
        return F.linear(x_TD.float(), wide_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, wide_ED = ctx.saved_tensors
        grad_x_TD, grad_weight_ED = None, None
        if ctx.needs_input_grad[1]:
            grad_weight_ED = (grad_TE.t() @ x_TD.float()).to(ctx.weight_dtype)
        if ctx.needs_input_grad[0]:
            grad_x_TD = torch.mm(grad_TE, wide_ED).to(x_TD.dtype)
        return grad_x_TD, grad_weight_ED
