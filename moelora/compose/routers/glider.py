"""GLIDER: PHATGOOSE's gates of tokens, mixed with centroids of whole prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from moelora.choices import register
from moelora.compose.routers.base import Composition, RouterRecipe
from moelora.compose.routers.centroids import Embedding, embedding_words, write_centroids
from moelora.compose.routers.phatgoose import Phatgoose
from moelora.compose.tokens import turn_start
from moelora.routing.run import batch_facts
from moelora.scores.centroids import check_tokens
from moelora.validation import check, check_choice, is_real


@register
@dataclass(frozen=True, kw_only=True)
class Glider(Phatgoose):
    """GLIDER (arXiv 2410.07172): what the prompt as a whole is about counts beside what each token says.

        z_e = (PHATGOOSE's z_e of the token) + alpha * cos(h - c_0, c_e - c_0) of its prompt,  softmax over the top k

    Written after the abstract, "global and local": all of the following are choices of ours. The global embedding h is
    that of the recipe `centroids`, a mean over the prompt's tokens in the base model itself, where the paper has a
    language model write an instruction and embeds that; centroids are relative to their common centre; `alpha` is one
    number for all prompts and sites; the two scores are added before the top k. A local score is some units wide and a
    cosine at most 1, hence an `alpha` above 1.

    The fields are those of `Phatgoose`, whose training of the gates it uses as it is, and:

    Args:
        embedding: "hidden" or "input", see `Centroids`.
        alpha: Factor of the prompt's score; 0 is PHATGOOSE.
        turn_start: Token ids that open a turn of the user, see `Centroids`.
    """

    kind: ClassVar[str] = "glider"

    embedding: Embedding = "hidden"
    alpha: float = 3.0
    turn_start: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("router.embedding", self.embedding, Embedding)
        check(is_real(self.alpha) and self.alpha >= 0, "router.alpha", self.alpha, "a number of at least 0")
        if self.turn_start is not None:
            check_tokens("router.turn_start", self.turn_start)

    def for_tokenizer(self, tokenizer: Any) -> RouterRecipe:
        """With the openings of turns in its chat template, unless they are set."""
        return self if self.turn_start is not None else replace(self, turn_start=turn_start(tokenizer))

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """Both scores, the top k of their sum."""
        words = embedding_words(base, self.embedding, self.turn_start)
        return {**super().axes(num_experts, base), "scores": {"kind": "glider", "alpha": self.alpha, **words}}

    def fit(self, composition: Composition) -> None:
        """Train the gates, then write the centroids.

        Raises:
            ComposeError: If a row has no answer to learn from.
        """
        # gates are trained without the prompt's embedding: one that is given spares the pass that would find it
        with batch_facts(instance_embedding=torch.zeros(1, 1)):
            super().fit(composition)
        write_centroids(composition)
