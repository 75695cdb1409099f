"""Top-p selection: as many experts as it takes to reach a share of the probability.

Shape suffixes: T tokens, E experts, K the most experts that any token keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.selection.base import Selection, renormalize
from moelora.validation import check, check_bool, is_real


@register
@dataclass(frozen=True, kw_only=True)
class TopP(Selection):
    """Every token is sent to its best experts until their probabilities sum to more than `p`.

    The one that crosses `p` is kept, as in nucleus sampling (arXiv 1904.09751); the best expert always is.

    Args:
        p: The share of the probability; with 1 all experts are kept.
        renormalize: Whether the weights of those that are kept are divided by their sum. If not, a feed-forward block,
            which is inside every expert, is scaled by that sum.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "top_p"
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("capacity", "capacity_factor", "capacity_in_eval"),
        "a capacity counts first choices, then second ones, of a fixed number for each token, and top-p has none. Use "
        "'top_k'.",
    )

    p: float = 0.8
    renormalize: bool = False

    def __post_init__(self) -> None:
        check(is_real(self.p) and 0 < self.p <= 1, "top_p", self.p, "0 < top_p <= 1")
        check_bool("selection.renormalize", self.renormalize)

    def check(self, config: Any) -> None:
        """Refuse scores that are not probabilities.

        Raises:
            ConfigError: With the reason.
        """
        if not config.scores.is_distribution:
            raise ConfigError(
                f"selection 'top_p' sums probabilities, and {config.scores.describe()} are none; allowed: linear "
                "scores with activation='softmax' and no bias."
            )

    @property
    def ignores_input(self) -> bool:
        """Always."""
        return True

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        weights_TK, ids_TK = scored.scores_TE.sort(dim=-1, descending=True, stable=True)
        # what an expert comes after: the first whose own probability crosses p is still below it there
        before_TK = weights_TK.detach().cumsum(-1) - weights_TK.detach()
        kept_TK = before_TK <= (self.p if self.p < 1 else 2.0)  # rounded sums may be above 1
        if ids_TK.device.type == "cpu" and len(ids_TK) and not _is_traced():
            K = int(kept_TK.sum(-1).max())  # reading it back would wait for an accelerator
            weights_TK, ids_TK, kept_TK = weights_TK[:, :K], ids_TK[:, :K], kept_TK[:, :K]
        weights_TK = weights_TK * kept_TK
        if self.renormalize:
            weights_TK = renormalize(weights_TK, scored.is_softmax)
        return Routing(scored.logits_TE, scored.probs_TE, weights_TK, ids_TK, kept_TK, sums_to_one=self.renormalize)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
