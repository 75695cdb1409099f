"""Scores by a classifier of the base model's last hidden states: X-LoRA.

Shape suffixes: B rows, S tokens of a row, T = B * S tokens, D features, E experts, L sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moelora.choices import Param, Site, register
from moelora.errors import ConfigError
from moelora.routing.prompts import BASE_HIDDEN
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.scores.mlp import mlp, mlp_params
from moelora.validation import check, check_bool, is_count, is_real, is_share


@register
@dataclass(frozen=True, kw_only=True)
class ClassifierScores(Scores):
    """X-LoRA (arXiv 2402.07148): a first pass of the base model, and on its hidden states a small network.

        z = W_n dropout(relu(... W_1 h + b_1 ...)) + b_n,  scores softmax(z / temperature), or z itself

    h is the last hidden state of each token without any adapter. The network runs once in a forward, before the layers,
    and every site reads its result: all the same scores, or with `layerwise` each site its own. It is trained through
    all sites; non-reentrant gradient checkpointing gives the same gradients, the reentrant kind is refused. A token's
    scores need all tokens before it in the first pass, so a call that continues a KV cache is refused.

    Args:
        features: D, the size of the hidden states.
        depth: Number of linear maps, each with a bias.
        size: Features between them; without effect at depth 1.
        dropout: Probability of the dropout between them; without effect at depth 1.
        softmax: Whether the scores are a softmax over the experts.
        temperature: Divides z before the softmax.
        layerwise: Whether each site has scores of its own.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "classifier"

    features: int = 1
    depth: int = 1
    size: int = 2048
    dropout: float = 0.2
    softmax: bool = True
    temperature: float = 1.0
    layerwise: bool = False

    def __post_init__(self) -> None:
        for name in ("features", "depth", "size"):
            check(is_count(getattr(self, name)), f"scores.{name}", getattr(self, name), "an integer of at least 1")
        check(is_share(self.dropout), "scores.dropout", self.dropout, "0 <= dropout < 1")
        check_bool("scores.softmax", self.softmax)
        check_bool("scores.layerwise", self.layerwise)
        T = self.temperature
        check(is_real(T) and T > 0, "scores.temperature", T, "a positive number")

    @property
    def needs(self) -> frozenset[str]:
        """The base model's last hidden states."""
        return frozenset({BASE_HIDDEN})

    @property
    def is_trained(self) -> bool:
        """Always."""
        return True

    @property
    def is_distribution(self) -> bool:
        """With a softmax."""
        return self.softmax

    @property
    def ignores_input(self) -> bool:
        """Always: it looks at what the model was called with."""
        return True

    @property
    def differs_by_site(self) -> bool:
        """With `layerwise`."""
        return self.layerwise

    def dropouts(self) -> dict[str, float]:
        """Between the linear maps."""
        return {"classifier_dropout": self.dropout}

    def params(self, site: Site) -> list[Param]:
        """`weight_0` [size, D] and `bias_0` [size] to the last, [E, L, size] and [E, L]; as `nn.Linear` starts.

        L is 1 without `layerwise`.
        """
        last = (site.num_experts, site.num_sharing if self.layerwise else 1)
        return mlp_params(self.features, self.depth, self.size, last)

    def prepare(
        self, hidden_BSD: Tensor, tensors: Mapping[str, Tensor], dropouts: Mapping[str, float], num_experts: int
    ) -> Tensor:
        """The logits z of each token, [B, S, L, E] in fp32; L is 1 without `layerwise`."""
        h = mlp(hidden_BSD, tensors, self.depth, dropouts["classifier_dropout"])
        return h.unflatten(-1, (num_experts, -1)).transpose(-1, -2)

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`.

        Raises:
            ConfigError: If a layer is called by itself, outside a run of its model.
        """
        if given.prepared is None:
            raise ConfigError(
                "the adapter routes by a first pass of the base model, and a layer was called outside of it; allowed: "
                "calls of the model, or of a part of it that is a model."
            )
        logits_TE = given.prepared[:, given.site_index if self.layerwise else 0]
        if self.softmax:
            logits_TE = logits_TE / self.temperature
        probs_TE = logits_TE.softmax(-1)
        return Scored(logits_TE, probs_TE, probs_TE if self.softmax else logits_TE, is_softmax=self.softmax)
