"""Scores of a linear and of what a sequence is about (MoR1E).

Shape suffixes: T tokens, D input features, E experts, N sequences, C centroids, H features of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.errors import ConfigError
from moelora.routing.prompts import prompt_mean
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.scores.centroids import Embedding
from moelora.scores.linear import router_logits
from moelora.validation import check, check_bool, check_choice, is_count, is_real


@register
@dataclass(frozen=True, kw_only=True)
class IntuitionScores(Scores):
    """`R = s omega softmax(W_g x) + t (1 - omega) c`, `omega = sigmoid(100 w)`, w = 0 first (MoR1E, arXiv 2404.08985).

    The intuition c is the cosines of the sequence's embedding with C centroids, the same for all of its tokens; with
    another number of centroids than of experts a linear map makes one of the other. The embedding is the fact
    `instance_embedding` if a batch has it, else a mean over the prompt's tokens of the base model: of its input
    embeddings, or of its last hidden states, which costs a pass over the prompt. W_g starts at 0.

    Args:
        num_centroids: C.
        features: H, features of the embedding; None is those of the base model.
        embedding: "input" or "hidden": what the mean is of.
        softmax_scale, intuition_scale: s and t.
        fitted: Whether `moelora.fit_centroids` has given the centroids their values; it says so itself.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "intuition"

    num_centroids: int = 32
    features: int | None = None
    embedding: Embedding = "input"
    softmax_scale: float = 32.0
    intuition_scale: float = 4.0
    fitted: bool = False

    def __post_init__(self) -> None:
        check(is_count(self.num_centroids), "num_centroids", self.num_centroids, "an integer of at least 1")
        H = self.features
        check(H is None or is_count(H), "scores.features", H, "an integer of at least 1, or None")
        check_choice("embedding", self.embedding, Embedding)
        for name in ("softmax_scale", "intuition_scale"):
            value = getattr(self, name)
            check(is_real(value) and value >= 0, f"scores.{name}", value, "a number of at least 0")
        check_bool("scores.fitted", self.fitted)

    @property
    def needs(self) -> frozenset[str]:
        """The embedding of each prompt."""
        return frozenset({self.fact})

    @property
    def fact(self) -> str:
        """The name of that mean."""
        return prompt_mean(self.embedding)

    @property
    def is_trained(self) -> bool:
        """Always."""
        return True

    def params(self, site: Site) -> list[Param]:
        """`weight` [E, D], `omega` [1], `map` [E, C] if C is not E, and `centroids` [C, H], one for all sites."""
        E, C = site.num_experts, self.num_centroids
        centroids = (C, self.features or site.model_features or 1)
        return [
            Param("weight", (E, site.router_features), Init("zeros")),
            Param("omega", (1,), Init("zeros"), dtype=torch.float32),
            *([Param("map", (E, C), Init("kaiming"))] if C != E else []),
            Param("centroids", centroids, Init("zeros"), False, torch.float32, shared="centroids"),
        ]

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`.

        Raises:
            ConfigError: If the centroids have not been fitted, or the embedding is of another size.
        """
        if not self.fitted:
            raise ConfigError(
                "the centroids that the adapter routes by have no values yet; allowed: centroids that were fitted to "
                "the training set. Call moelora.fit_centroids(model, examples) once, before training; they are saved "
                "with the adapter."
            )
        tokens, centroids_CH = given.tokens, given.tensors["centroids"]
        h_NH = tokens.fact_N("instance_embedding" if tokens.has_fact("instance_embedding") else self.fact)
        if h_NH.shape[-1] != centroids_CH.shape[-1]:
            raise ConfigError(
                f"instance_embedding has {h_NH.shape[-1]} features, the centroids have {centroids_CH.shape[-1]}; "
                "allowed: embeddings of the sort that they were fitted to."
            )
        c_NE = F.linear(F.normalize(h_NH.float(), dim=-1), F.normalize(centroids_CH.float(), dim=-1))
        if "map" in given.tensors:
            c_NE = F.linear(c_NE, given.tensors["map"].float())
        logits_TE = router_logits(given.x_TD, given.tensors["weight"])
        probs_TE = logits_TE.softmax(-1)
        omega = torch.sigmoid(100 * given.tensors["omega"].float())
        own_TE = self.softmax_scale * omega * probs_TE
        scores_TE = own_TE + self.intuition_scale * (1 - omega) * c_NE[tokens.sequence_T()]
        return Scored(logits_TE, probs_TE, scores_TE, is_softmax=False)
