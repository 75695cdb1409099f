"""Balance losses: pure functions of routing records.

One convention (rule 4 of the design): a balance loss is `E * sum_e f_e P_e` a layer, 1.0 at perfect balance, then the
mean over the layers (each counted once for every active adapter), over valid tokens only. f is the share of choices
that fell on an expert (no gradient), P the mean router probability. The pooled form of Mixtral's code is the
alternative (`BalanceConfig.loss`).

Both losses are linear in sums of per-token terms once the totals (f and the number of tokens) are known. So the totals
are taken over everything that belongs to one optimizer step, and each micro-batch and process adds its own linear
share; the sum of the shares is the loss of the whole, value and gradient.

Shape suffixes: T tokens, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moelora.config import BalanceConfig
from moelora.errors import ConfigError
from moelora.routing.decision import Routing
from moelora.routing.recorder import LayerLoss, Mixture, RoutingRecord


@dataclass(frozen=True, eq=False)
class RoutingTotals:
    """What one balance is taken over: for each mixture the choices of each expert and the number of valid tokens.

    Attributes:
        mixtures: Layer and adapter of each mixture, in order.
        counts: Choices that fell on each expert [E], a mixture.
        tokens: Number of valid tokens, a mixture.
    """

    mixtures: tuple[Mixture, ...]
    counts: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]

    @classmethod
    def of(cls, records: Sequence[RoutingRecord]) -> RoutingTotals:
        """Sum up records; several of one mixture (several forwards) are added."""
        counts: dict[Mixture, Tensor] = {}
        tokens: dict[Mixture, Tensor] = {}
        for record in records:
            device = records[0].valid_T.device  # layers may be spread over devices
            valid = record.valid_T.sum().float().to(device)
            counts_E = record.counts_E().to(device)
            seen = record.mixture in counts
            counts[record.mixture] = counts[record.mixture] + counts_E if seen else counts_E
            tokens[record.mixture] = tokens[record.mixture] + valid if seen else valid
        return cls(tuple(counts), tuple(counts.values()), tuple(tokens.values()))

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        if self.mixtures != other.mixtures:
            raise ConfigError(f"routing totals of different layers: {self.mixtures} and {other.mixtures}.")
        return RoutingTotals(
            self.mixtures,
            tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True)),
        )

    def all_reduce(self) -> RoutingTotals:
        """The sum over all processes, in one collective."""
        flat = torch.cat([*self.counts, torch.stack(self.tokens)])
        dist.all_reduce(flat)
        sizes = [len(counts_E) for counts_E in self.counts]
        *counts, tokens = flat.split([*sizes, len(self.tokens)])
        return RoutingTotals(self.mixtures, tuple(counts), tuple(tokens.unbind()))


def layer_losses(totals: RoutingTotals, config: BalanceConfig) -> dict[Mixture, tuple[LayerLoss, LayerLoss]]:
    """For each mixture two functions of (routing, valid_T): its share of the balance loss and of the z-loss.

    A share is linear in the tokens given, so shares of disjoint sets of tokens add up to the loss of their union. The
    coefficients are not applied.

    Args:
        totals: Sums over all tokens that the loss is taken over.
        config: Which form.

    Raises:
        ConfigError: For the pooled form with layers of different numbers of experts.
    """
    num_layers = len(totals.mixtures)
    shares_E: list[Tensor]
    if config.loss == "mixtral":
        sizes = sorted({len(counts_E) for counts_E in totals.counts})
        if len(sizes) > 1:
            raise ConfigError(f"balance.loss 'mixtral' pools the layers, but they have {sizes} experts; use 'switch'.")
        pooled_tokens = torch.stack(totals.tokens).sum().clamp_min(1)
        pooled_E = torch.stack(totals.counts).sum(0) / pooled_tokens
        shares_E = [pooled_E * len(pooled_E) / pooled_tokens] * num_layers
    else:
        shares_E = [
            counts_E / counts_E.sum().clamp_min(1e-9) * len(counts_E) / tokens.clamp_min(1) / num_layers
            for counts_E, tokens in zip(totals.counts, totals.tokens, strict=True)
        ]
    z_shares = [1 / tokens.clamp_min(1) / num_layers for tokens in totals.tokens]
    return {
        mixture: (_balance_share(share_E), _z_share(z_share))
        for mixture, share_E, z_share in zip(totals.mixtures, shares_E, z_shares, strict=True)
    }


def _balance_share(share_E: Tensor) -> LayerLoss:
    def loss(routing: Routing, valid_T: Tensor) -> Tensor:
        prob_sums_E = (routing.probs_TE * valid_T.unsqueeze(-1)).sum(0)
        return (share_E.to(prob_sums_E.device) * prob_sums_E).sum()

    return loss


def _z_share(z_share: Tensor) -> LayerLoss:
    def loss(routing: Routing, valid_T: Tensor) -> Tensor:
        squares_T = routing.logits_TE.logsumexp(-1).square() * valid_T
        return z_share.to(squares_T.device) * squares_T.sum()

    return loss


def balance_losses(
    records: Sequence[RoutingRecord], config: BalanceConfig | None = None, totals: RoutingTotals | None = None
) -> tuple[Tensor, Tensor]:
    """The balance loss and the z-loss of a forward, without coefficients, differentiable.

    Args:
        records: What `record_routing` or the trainer collected.
        config: Which form; `BalanceConfig()` by default.
        totals: Sums over all tokens that the losses are taken over; those of `records` by default.

    Returns:
        Two scalars: the balance loss (1.0 at perfect balance for "switch") and the z-loss.

    Raises:
        ConfigError: If there are no records.
    """
    if not records:
        raise ConfigError("no routing records; allowed: at least one. Was the forward run inside `record_routing`?")
    losses = layer_losses(totals or RoutingTotals.of(records), config or BalanceConfig())
    terms = [[loss(record.routing, record.valid_T) for loss in losses[record.mixture]] for record in records]
    device = terms[0][0].device
    balance, z = (torch.stack([term[i].to(device) for term in terms]).sum() for i in (0, 1))
    return balance, z


def switch_balance_loss(routing: Routing, valid_T: Tensor) -> Tensor:
    """`E * sum_e f_e P_e` of one layer (Switch, arXiv 2101.03961, Eq. 4, with f over all k choices, divided by k).

    Args:
        routing: The decision for T tokens.
        valid_T: True where a token counts.

    Returns:
        A scalar; 1.0 at perfect balance, E if everything goes to one expert.
    """
    return balance_losses([RoutingRecord("layer", "default", routing, valid_T)])[0]


def mixtral_balance_loss(records: Sequence[RoutingRecord]) -> Tensor:
    """The pooled form of Mixtral's and MixLoRA's code: tokens of all layers together, `E * sum_ke f_ke P_e`.

    Returns:
        A scalar; k at perfect balance.
    """
    return balance_losses(records, BalanceConfig(loss="mixtral"))[0]


def z_loss(routing: Routing, valid_T: Tensor) -> Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906, Eq. 5) of one layer: the mean of `logsumexp(z)^2`."""
    return balance_losses([RoutingRecord("layer", "default", routing, valid_T)])[1]
