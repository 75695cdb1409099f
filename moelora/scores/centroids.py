"""Scores of a whole sequence: how near its prompt is to what each expert was made for.

Shape suffixes: N sequences, T tokens, D features of an embedding, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.routing.prompts import prompt_mean
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.validation import check, check_choice, is_count, is_index

Embedding = Literal["hidden", "input"]


@register
@dataclass(frozen=True, kw_only=True)
class CentroidScores(Scores):
    """Cosine of the prompt's embedding with each expert's centroid, both relative to a common centre.

        z_e = cos(h - c_0, c_e - c_0)

    The embedding h is the fact `instance_embedding` if a batch has it, else a mean over the prompt's tokens: of the
    base model's last hidden states, which costs one pass over the prompt without adapters, or of its input embeddings.
    It is decided once for a sequence: in generation by the prompt, of a conversation by its last turn.

    Args:
        features: D, the size of the embedding.
        embedding: "hidden" or "input".
        turn_start: Token ids that open a turn of the user in the base's chat template
            (`moelora.compose.tokens.turn_start`). Of a prompt that has them more than once what stands between the
            first and the last opening is left out of the mean, as if the earlier turns had not been said. Empty: the
            mean is over the whole prompt, as it is in a batch of `inputs_embeds`.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "centroids"

    features: int = 1
    embedding: Embedding = "hidden"
    turn_start: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(is_count(self.features), "scores.features", self.features, "an integer of at least 1")
        check_choice("scores.embedding", self.embedding, Embedding)
        check_tokens("scores.turn_start", self.turn_start)

    @property
    def needs(self) -> frozenset[str]:
        """The embedding of each prompt."""
        return frozenset({self._fact})

    @property
    def _fact(self) -> str:
        return prompt_mean(self.embedding, self.turn_start)

    @property
    def is_trained(self) -> bool:
        """Never: centroids are fitted."""
        return False

    @property
    def ignores_input(self) -> bool:
        """Always."""
        return True

    def params(self, site: Site) -> list[Param]:
        """`centroids` [E, D] and `center` [1, D], in fp32."""
        return [
            Param("centroids", (site.num_experts, self.features), Init("zeros"), False, torch.float32),
            Param("center", (1, self.features), Init("zeros"), False, torch.float32),
        ]

    def cosines_TE(self, given: RouterInput) -> Tensor:
        """Each token has the cosines of its sequence."""
        tokens = given.tokens
        h_ND = tokens.fact_N("instance_embedding" if tokens.has_fact("instance_embedding") else self._fact)
        z_NE = cosines(h_ND, given.tensors["centroids"], given.tensors["center"])
        return z_NE[tokens.sequence_T()]

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`."""
        z_TE = self.cosines_TE(given)
        return Scored(z_TE, z_TE.softmax(-1), z_TE, is_softmax=False)


def check_tokens(name: str, value: Any) -> None:
    """Refuse what is no list of token ids.

    Raises:
        ConfigError: With the value.
    """
    check(isinstance(value, list) and all(map(is_index, value)), name, value, "a list of token ids")


def cosines(h_ND: Tensor, centroids_ED: Tensor, center_1D: Tensor) -> Tensor:
    """Cosine [N, E] of embeddings with centroids, both relative to a centre, in fp32."""
    center_1D = center_1D.float()
    return F.linear(
        F.normalize(h_ND.float() - center_1D, dim=-1), F.normalize(centroids_ED.float() - center_1D, dim=-1)
    )
