"""How a method sees the tasks: all at once, one after the other, each apart, or as LoRAs that exist already."""

from __future__ import annotations

from typing import Any

from eval.compare.regimes.apart import Apart
from eval.compare.regimes.base import Regime
from eval.compare.regimes.composed import Composed
from eval.compare.regimes.grouped import Grouped
from eval.compare.regimes.grown import Grown
from eval.compare.regimes.in_turn import InTurn
from eval.compare.regimes.orthogonal import Orthogonal
from eval.compare.regimes.together import Together
from moelora.errors import RunError
from moelora.runs.schema import build

REGIMES: dict[str, type[Regime]] = {
    each.kind: each for each in (Together, InTurn, Orthogonal, Apart, Grouped, Grown, Composed)
}


def read_regime(words: Any, where: str) -> Regime:
    """The regime of `kind` and its words.

    Raises:
        MoeLoraError: If there is none of that kind, or it has no such words.
    """
    if words is None:
        return Together()
    given = {"kind": words} if isinstance(words, str) else dict(words) if isinstance(words, dict) else {"kind": words}
    kind = given.pop("kind", None)
    if kind not in REGIMES:
        raise RunError(f"{where} is {words!r}; allowed kinds: {', '.join(REGIMES)}.")
    return build(REGIMES[kind], given, where)
