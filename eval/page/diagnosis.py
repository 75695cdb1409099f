"""What `moelora diagnose` found, in the form that the page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.page.matrix import Json, matrix
from moelora.errors import ReportError

_ARMS = ("base", "shared", "own", "random")


def read_diagnosis(content: Json) -> Json | None:
    """The verdict, the table and the matrices.

    Args:
        content: Of diagnosis.json; empty if there is none.

    Returns:
        `verdict`, `next`, `arms`, `rows`, `matrices` and `layers` in plain types; None for no content.

    Raises:
        ReportError: If something is missing in it.
    """
    if not content:
        return None
    try:
        tasks = list(content["tasks"])
        against, moments = content["transfer"]["against_base"], content["conflict"]
        limit = max((abs(value) for row in against.values() for value in row.values()), default=0.0)
        return {
            "verdict": content["verdict"],
            "next": content["next"],
            "arms": list(_ARMS),
            "rows": [_row(name, line) for name, line in {**content["tasks"], "mean of tasks": content["mean"]}.items()],
            "matrices": [
                _matrix(
                    "Transfer.",
                    "The LoRA of a row's task on the rows of a column's task: loss minus the base model's, in nats. "
                    "Negative (blue) helps.",
                    {a: {b: -against[a][b] for b in tasks} for a in tasks},
                    limit,
                    -1,
                ),
                *(
                    _matrix(
                        f"Conflict {words} training.",
                        "Cosine of two tasks' gradients by the shared LoRA's parameters: -1 (orange) pulls apart, 1 "
                        "(blue) is alike; on the diagonal two halves of one task's rows, which is what noise leaves of "
                        f"1.{note}",
                        moments[moment]["overall"],
                        1.0,
                        1,
                    )
                    for moment, words, note in (
                        ("start", "before", ""),
                        (
                            "end",
                            "after",
                            " At rest the tasks' gradients cancel, so that two tasks show -1 anyway.",
                        ),
                    )
                ),
            ],
            "layers": [
                {"layer": layer, "start": value, "end": moments["end"]["layers"][layer]}
                for layer, value in moments["start"]["layers"].items()
            ],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"diagnosis.json lacks {error}; let `moelora diagnose` write it again.") from error


def _row(name: str, line: Mapping[str, Any]) -> Json:
    headroom = line["headroom"]
    return {
        "task": name,
        "losses": [line[arm] for arm in _ARMS],
        "headroom": headroom["value"],
        "stderr": headroom["stderr"],
        "n": headroom["n"],
        "told_apart": line["told_apart"],
    }


def _matrix(title: str, note: str, good: Mapping[str, Mapping[str, float]], limit: float, sign: int) -> Json:
    """A table with colours.

    Args:
        title: Its caption.
        note: What it says.
        good: Values by row and column, the greater the better.
        limit: Where the colour is strongest.
        sign: 1 shows these values, -1 their opposites.
    """
    rows = {name: [(f"{sign * value:+.2f}", value) for value in row.values()] for name, row in good.items()}
    return matrix(title, note, list(good), rows, limit)
