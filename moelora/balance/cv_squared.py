"""The squared coefficient of variation of what the experts get, as a loss.

It is no sum over tokens. Once the totals are known it is replaced by the linear function of the tokens that has its
value and its gradient there, so that shares of micro-batches and processes add up to it as those of the other losses.

Shape suffixes: T tokens, E experts, S experts of a layer of a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import RoutingTotals
from moelora.balance.tree import OfTree
from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.decision import Routing
from moelora.routing.record import LayerLoss, Mixture
from moelora.scores.tree import by_level


def cv_squared(x: Tensor) -> Tensor:
    """Variance over squared mean, with the unbiased variance; 0 of one number."""
    return x.var() / (x.mean().square() + 1e-10) if len(x) > 1 else x.sum() * 0


@dataclass(frozen=True, kw_only=True)
class _OfSums(Balance):
    """A loss of the sums over all tokens of what each expert gets, `Routing.sums_2E`."""

    needs_sums: ClassVar[bool] = True

    def of_sums(self, sums_2E: Tensor) -> Tensor:
        """The loss of one mixture."""
        raise NotImplementedError

    def shares(self, totals: RoutingTotals) -> Mapping[Mixture, LayerLoss]:
        """See `Balance.shares`."""
        return {
            mixture: _linear(self.of_sums, sums_2E, tokens.clamp_min(1), totals.num_ran)
            for (mixture, sums_2E), tokens in zip(totals.sums.items(), totals.tokens_L, strict=True)
        }


def _linear(loss_of: Callable[[Tensor], Tensor], sums_2E: Tensor, tokens: Tensor, num_ran: Tensor) -> LayerLoss:
    with torch.enable_grad():
        at_2E = sums_2E.detach().clone().requires_grad_()
        value = loss_of(at_2E)
        (slope_2E,) = torch.autograd.grad(value, at_2E)
    rest = value.detach() - (slope_2E * sums_2E).sum()

    def loss(routing: Routing, valid_T: Tensor) -> Tensor:
        own_2E = routing.sums_2E(valid_T)
        device = own_2E.device
        linear = (slope_2E.to(device) * own_2E).sum() + rest.to(device) * valid_T.sum() / tokens.to(device)
        return linear / num_ran.to(device)

    return loss


@register
@dataclass(frozen=True, kw_only=True)
class CvSquaredBalance(_OfSums):
    """`CV^2(sum_t g_te)` per layer, g the weights (the importance loss of arXiv 1701.06538), then the mean over layers.

    CV^2 is the variance over the experts by the squared mean; 0 at perfect balance. It works with dense selection too,
    where there is no load. Deviations: the unbiased variance, as in LoRAMoE's and S'MoRE's code; valid tokens only.

    Args:
        coef: Coefficient of the loss. 0 switches it off.

    Raises:
        ConfigError: For a negative coefficient.
    """

    kind: ClassVar[str] = "cv_squared"

    def of_sums(self, sums_2E: Tensor) -> Tensor:
        """See `_OfSums.of_sums`."""
        return cv_squared(sums_2E[0])


@register
@dataclass(frozen=True, kw_only=True)
class TreeCvSquaredBalance(OfTree, _OfSums):
    """`CV^2(importance) + CV^2(load)` of each layer of a tree, the mean over its layers, then the model's (S'MoRE).

    The importance of an expert is the sum of its weights, its load the number of tokens that it would be expected to
    get if the noise were drawn anew (Shazeer et al., arXiv 1701.06538, Eq. 8 to 11), whoever its parent. 0 at balance.

    Args:
        coef: Coefficient of the loss. 0 switches it off.
        sizes: The number of experts in each layer of the tree, leaves first.

    Raises:
        ConfigError: For a negative coefficient, or no list of sizes.
    """

    kind: ClassVar[str] = "tree_cv_squared"

    def check(self, config: Any) -> None:
        """Refuse another selection than that of the same tree, and scores without noise.

        Raises:
            ConfigError: With the reason.
        """
        super().check(config)
        if not config.scores.noise:
            raise ConfigError(
                "balance 'tree_cv_squared' takes the load that is expected of the noise, and the scores have none; "
                "allowed: scores with noise=True. Use 'tree_switch'."
            )

    def of_sums(self, sums_2E: Tensor) -> Tensor:
        """See `_OfSums.of_sums`."""
        levels = by_level(sums_2E, self.sizes).values()
        terms = [cv_squared(importance_CS.sum(0)) + cv_squared(load_CS.sum(0)) for importance_CS, load_CS in levels]
        return torch.stack(terms).mean()
