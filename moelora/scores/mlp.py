"""Scores of a small network of a token, or of the last token of its sequence.

Shape suffixes: T tokens, D input features, E experts, N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.autocast import no_autocast
from moelora.choices import Init, Param, Site, register
from moelora.errors import ConfigError
from moelora.routing.batch import Tokens
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.validation import check, check_choice, is_count, is_share

Per = Literal["token", "sequence"]


def mlp(h: Tensor, tensors: Mapping[str, Tensor], depth: int, dropout: float) -> Tensor:
    """`W_n dropout(relu(... W_1 h + b_1 ...)) + b_n` in fp32, under autocast too.

    Args:
        h: The input [..., D].
        tensors: Those of `mlp_params`.
        depth: n.
        dropout: Its probability now.

    Returns:
        [..., O], O the product of the last shape.
    """
    with no_autocast(h.device):
        h = h.float()
        for i in range(depth):
            if i > 0:
                h = F.dropout(h.relu(), dropout)
            weight = tensors[f"weight_{i}"].float().flatten(0, -2)
            h = F.linear(h.to(weight.device), weight, tensors[f"bias_{i}"].float().flatten())
    return h


def mlp_params(features: int, depth: int, size: int, last: tuple[int, ...]) -> list[Param]:
    """`weight_0` [size, features] and `bias_0` [size] to the last, [*last, size] and `last`; as `nn.Linear` starts."""
    outs: list[tuple[int, ...]] = [*[(size,)] * (depth - 1), last]
    found = []
    for i, out in enumerate(outs):
        given = features if i == 0 else size
        found.append(Param(f"weight_{i}", (*out, given), Init("kaiming")))
        found.append(Param(f"bias_{i}", out, Init("uniform", given**-0.5)))
    return found


@register
@dataclass(frozen=True, kw_only=True)
class MlpScores(Scores):
    """`softmax(W_n dropout(relu(... W_1 x + b_1 ...)) + b_n)` over the experts, the gate of MixDA.

    arXiv 2306.05406. With `per="sequence"` x is the last valid token of a token's sequence, so that one decision holds
    for all of them. In a layer whose tokens must not see later ones that is refused.

    Args:
        depth: Number of linear maps, each with a bias.
        size: Features between them; without effect at depth 1.
        dropout: Probability of the dropout between them; without effect at depth 1.
        per: "token" or "sequence": what a decision is made of, and for.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "mlp"

    depth: int = 4
    size: int = 768
    dropout: float = 0.2
    per: Per = "token"

    def __post_init__(self) -> None:
        for name in ("depth", "size"):
            check(is_count(getattr(self, name)), f"scores.{name}", getattr(self, name), "an integer of at least 1")
        check(is_share(self.dropout), "scores.dropout", self.dropout, "0 <= dropout < 1")
        check_choice("per", self.per, Per)

    def check_site(self, site: Site) -> None:
        """See `Choice.check_site`."""
        if self.per == "sequence" and site.causal is not False:
            what = (
                "attends to earlier tokens only" if site.causal else "does not say whether it attends to later tokens"
            )
            raise ConfigError(
                f"per is 'sequence', and {site.name!r} is in a layer that {what}: the last token would decide for "
                "those before it, which must not see it; allowed: per='token', where each token decides for itself, "
                "or an encoder."
            )

    @property
    def is_trained(self) -> bool:
        """Always."""
        return True

    @property
    def is_distribution(self) -> bool:
        """Always."""
        return True

    @property
    def reads_batch(self) -> bool:
        """With `per="sequence"`."""
        return self.per == "sequence"

    def dropouts(self) -> dict[str, float]:
        """Between the linear maps."""
        return {"gate_dropout": self.dropout}

    def params(self, site: Site) -> list[Param]:
        """See `mlp_params`; the last is [E, size]."""
        return mlp_params(site.router_features, self.depth, self.size, (site.num_experts,))

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`."""
        x = given.x_TD
        if self.per == "sequence":
            x = x[last_tokens_N(given.tokens)]
        logits = mlp(x, given.tensors, self.depth, given.dropouts["gate_dropout"])
        logits_TE = logits[given.tokens.sequence_T()] if self.per == "sequence" else logits
        probs_TE = logits_TE.softmax(-1)
        return Scored(logits_TE, probs_TE, probs_TE, is_softmax=True)


def last_tokens_N(tokens: Tokens) -> Tensor:
    """Index of the last valid token of each sequence, among the flattened tokens; 0 of one that has none."""
    sequence_T = tokens.sequence_T()
    index_T = torch.arange(len(sequence_T), device=sequence_T.device) * tokens.valid_T
    return sequence_T.new_zeros(tokens.num_sequences).scatter_reduce(0, sequence_T, index_T, "amax")
