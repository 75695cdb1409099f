"""GLIDER: PHATGOOSE's gates of tokens, mixed with centroids of whole prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moelora.choices import register
from moelora.compose.routers.base import Composition
from moelora.compose.routers.centroids import ComparesPrompts, write_centroids
from moelora.compose.routers.phatgoose import Phatgoose
from moelora.routing.run import batch_facts
from moelora.validation import check, is_real


@register
@dataclass(frozen=True, kw_only=True)
class Glider(Phatgoose, ComparesPrompts):
    """GLIDER (arXiv 2410.07172): what the prompt as a whole is about counts beside what each token says.

        z_e = (PHATGOOSE's z_e of the token) + alpha * cos(h - c_0, c_e - c_0) of its prompt,  softmax over the top k

    Written after the abstract, "global and local": all of the following are choices of ours. The global embedding h is
    that of the recipe `centroids`, a mean over the prompt's tokens in the base model itself, where the paper has a
    language model write an instruction and embeds that; centroids are relative to their common centre; `alpha` is one
    number for all prompts and sites; the two scores are added before the top k. A local score is some units wide and a
    cosine at most 1, hence an `alpha` above 1.

    The fields are those of `Phatgoose`, whose training of the gates it uses as it is, of `ComparesPrompts`, and:

    Args:
        alpha: Factor of the prompt's score; 0 is PHATGOOSE.
    """

    kind: ClassVar[str] = "glider"

    alpha: float = 3.0

    def __post_init__(self) -> None:
        Phatgoose.__post_init__(self)
        ComparesPrompts.__post_init__(self)
        check(is_real(self.alpha) and self.alpha >= 0, "router.alpha", self.alpha, "a number of at least 0")

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """Both scores, the top k of their sum."""
        words = {"kind": "glider", "alpha": self.alpha, **self.prompt_scores(base)}
        return {**super().axes(num_experts, base), "scores": words}

    def fit(self, composition: Composition) -> None:
        """Train the gates, then write the centroids.

        Raises:
            ComposeError: If a row has no answer to learn from.
        """
        # gates are trained without the prompt's embedding: one that is given spares the pass that would find it
        with batch_facts(instance_embedding=torch.zeros(1, 1)):
            super().fit(composition)
        write_centroids(composition)
