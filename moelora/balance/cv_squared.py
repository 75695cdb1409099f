"""The squared coefficient of variation of what the experts get, as a loss.

It is no sum over tokens. Once the totals are known it is replaced by the linear function of the tokens that has its
value and its gradient there, so that shares of micro-batches and processes add up to it as those of the other losses.

Shape suffixes: L mixtures, E experts, C chains of nodes of a tree, S experts of a layer of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import MixtureTotals
from moelora.balance.tree import OfTree
from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.decision import Routing
from moelora.scores.tree import by_level


def cv_squared(x: Tensor) -> Tensor:
    """Variance over squared mean along the last dimension, with the unbiased variance; 0 of one number."""
    return x.var(-1) / (x.mean(-1).square() + 1e-10) if x.shape[-1] > 1 else x.sum(-1) * 0


@dataclass(frozen=True, kw_only=True)
class _OfSums(Balance):
    """A loss of the sums over all tokens of what each expert gets, `Routing.sums_2E`."""

    needs_sums: ClassVar[bool] = True

    def of_sums(self, sums_L2E: Tensor) -> Tensor:
        """The loss of each mixture [L]."""
        raise NotImplementedError

    def of_routing(self, routing: Routing, valid_LT: Tensor, totals: MixtureTotals) -> Tensor:
        """See `Balance.of_routing`."""
        sums_L2E = totals.sums_L2E
        assert sums_L2E is not None
        with torch.enable_grad():
            at_L2E = sums_L2E.detach().clone().requires_grad_()
            value_L = self.of_sums(at_L2E)
            (slope_L2E,) = torch.autograd.grad(value_L.sum(), at_L2E)
        rest_L = (value_L.detach() - (slope_L2E * sums_L2E).sum((-2, -1))) / totals.tokens_L.clamp_min(1)
        linear_L = (slope_L2E * routing.sums_2E(valid_LT)).sum((-2, -1)) + rest_L * valid_LT.sum(-1)
        return linear_L / totals.model.num_ran.to(valid_LT.device)


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

    def of_sums(self, sums_L2E: Tensor) -> Tensor:
        """See `_OfSums.of_sums`."""
        return cv_squared(sums_L2E[:, 0])


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

    def of_sums(self, sums_L2E: Tensor) -> Tensor:
        """See `_OfSums.of_sums`."""
        # of each layer of the tree the importance and the load of its experts, whoever their parents
        terms = [cv_squared(sums_L2CS.sum(-2)).sum(-1) for sums_L2CS in by_level(sums_L2E, self.sizes).values()]
        return torch.stack(terms).mean(0)
