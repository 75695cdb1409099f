"""Routers and selections without a layer or a model around them."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.choices import Site
from moelora.routing.batch import Tokens
from moelora.routing.decision import Routing
from moelora.routing.router import Router
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.scores.linear import LinearScores
from moelora.selection.base import Selection

SOFTMAX = LinearScores()
SIGMOID = LinearScores(activation="sigmoid")
BIASED = LinearScores(activation="sigmoid", bias=True)


def site_of(in_features: int, num_experts: int) -> Site:
    """A site on one linear, with a router."""
    return Site(
        name="layer",
        linears={"": (in_features, in_features)},
        num_experts=num_experts,
        routed=True,
        router_features=in_features,
    )


def new_router(
    selection: Selection, scores: Scores = SOFTMAX, *, in_features: int = 12, num_experts: int = 4
) -> Router:
    """A router in eval mode, as it starts."""
    return Router(site_of(in_features, num_experts), scores, selection).eval()


def every_token(B: int, S: int) -> Tokens:
    """B rows of S valid tokens."""
    return Tokens(torch.ones(B, S, dtype=torch.bool))


def bias_of(router: Router) -> Tensor:
    """The router's bias, to set."""
    return router.get_parameter("bias").data


def select(
    selection: Selection,
    scores_TE: Tensor,
    tokens: Tokens | None = None,
    *,
    training: bool = False,
) -> Routing:
    """A selection's decision on scores, which stand for logits and probabilities too."""
    dropouts = {name: p if training else 0.0 for name, p in selection.dropouts().items()}
    given = RouterInput(
        scores_TE, tokens or every_token(1, len(scores_TE)), scores_TE.shape[-1], {}, dropouts, training
    )
    return selection.select(Scored(scores_TE, scores_TE, scores_TE, is_softmax=False), given)
