"""Experts chosen from a pool by a few rows, with a router that is trained afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moelora.choices import register
from moelora.compose.choose import choose
from moelora.compose.routers.base import Example, rows_with_answers
from moelora.compose.routers.simple import TopK
from moelora.validation import check, is_count, is_real


@register
@dataclass(frozen=True, kw_only=True)
class KShot(TopK):
    """The LoRAs that `choose` takes from the pool by the rows of all names together, with a `topk` router over them.

    The router is to be trained, on the same few rows or others: `moelora train` does. The fields are those of `TopK`,
    and:

    Args:
        count: How many experts to choose.
        diversity: How much it counts that they differ, 0 to 1: see `choose`.
    """

    kind: ClassVar[str] = "kshot"
    reads_examples: ClassVar[bool] = True

    count: int = 4
    diversity: float = 0.5

    def __post_init__(self) -> None:
        check(is_count(self.count), "router.count", self.count, "an integer of at least 1")
        share = self.diversity
        check(is_real(share) and 0 <= share <= 1, "router.diversity", share, "a number of 0 to 1")

    def check_examples(self, names: Any, examples: Any) -> None:
        """Refuse no rows at all; for which expert they are does not matter.

        Raises:
            ComposeError: If there are none, or one has no answer.
        """
        rows_with_answers(self.kind, examples)

    def chosen(
        self, base: Any, loras: Mapping[str, str], examples: Mapping[str, Sequence[Example]], check_base_name: bool
    ) -> Mapping[str, str]:
        """See `choose`."""
        rows = rows_with_answers(self.kind, examples)
        found = choose(base, loras, rows, self.count, diversity=self.diversity, check_base_name=check_base_name)
        return {name: loras[name] for name in found.names}
