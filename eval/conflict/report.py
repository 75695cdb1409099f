"""A diagnosis for people: on the terminal, and as README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.conflict.plan import ARMS
from moelora.runs.tables import markdown, terminal
from moelora.runs.wording import commit_words, minutes

_HEADER = ("task", "n", "base", "shared", "own", "random", "headroom", "told apart")
_READING = (
    "Loss of an answer's token in nats, mean over rows that nobody trained on; lower is better. *shared*: one LoRA "
    "on all rows. *own*: a LoRA for each task, asked about its own task, which is what a perfect router by task "
    "reaches. *random*: as many LoRAs on random parts of the rows, each row's loss averaged over them. *headroom*: "
    "shared - own, ± its standard error, paired by rows. *told apart*: share of prompts whose nearest centroid is "
    "their own task's."
)


def table(found: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows of the table; the last row is the mean."""
    lines = {**found["tasks"], "mean": found["mean"]}
    return _HEADER, [
        [
            task,
            str(line["headroom"]["n"]),
            *(f"{line[arm]:.3f}" for arm in ("base", *ARMS)),
            with_error(line["headroom"]),
            f"{line['told_apart']:.0%}",
        ]
        for task, line in lines.items()
    ]


def with_error(estimate: Mapping[str, Any]) -> str:
    """An estimate as a person writes it."""
    return f"{estimate['value']:+.3f} ± {estimate['stderr']:.3f}"


def notes(found: Mapping[str, Any]) -> list[str]:
    """What else has to be known to read the numbers."""
    arms = found["arms"]
    sizes = "; ".join(
        f"{arm}: {each['loras']} of rank {each['rank']}, learning rate {each['learning_rate']:g}"
        for arm, each in arms.items()
    )
    lines = [
        f"Each arm has {found['trainable_parameters']:,} trainable parameters (the configuration's adapter "
        f"{found['adapter_parameters']:,}) and {arms['shared']['steps']} steps in all. LoRAs: {sizes}.",
        f"What partitioning alone costs, random - shared: {with_error(found['mean']['partition'])} nats.",
    ]
    for end, choose in (("largest", max), ("smallest", min)):
        edge = [
            arm
            for arm, each in arms.items()
            if len(each["selection"]) > 1 and each["factor"] == choose(each["selection"], key=float)
        ]
        if edge:
            lines.append(
                f"The {end} learning rate was the best for {', '.join(edge)}: a wider grid (--rates) may move the "
                "numbers."
            )
    if found["mean"]["shared"] >= found["mean"]["base"]:
        lines.append(
            "The shared LoRA is no better than the base model: it was trained too little or at a wrong learning rate, "
            "and the verdict is worth little."
        )
    if found["rows_dropped"]:
        lines.append(f"{found['rows_dropped']} rows were left out because their prompt is held out.")
    return [*lines, "One training run each: the standard errors are those of rows, not of seeds."]


def on_terminal(found: Mapping[str, Any]) -> str:
    """Table, verdict and what to do next."""
    verdict = found["verdict"]
    steps = "\n".join(f"Next      {step['why']}:\n          {step['command']}" for step in found["next"])
    reasons = "\n".join(f"          {reason}" for reason in verdict["reasons"])
    after = "\n".join(f"          {note}" for note in notes(found))
    return (
        f"\nLoss of an answer's token in nats on held-out rows; headroom = shared - own, ± standard error\n\n"
        f"{terminal(*table(found))}\n\nVerdict   {verdict['text']}\n{reasons}\n{after}\n\n{steps}"
    )


def readme(found: Mapping[str, Any]) -> str:
    """The page README.md."""
    receipt = found["receipt"]
    tasks = list(found["tasks"])
    against = found["transfer"]["against_base"]
    end, start = (found["conflict"][moment]["overall"] for moment in ("end", "start"))
    sections = [
        f"# Do these tasks need a mixture? {found['model']}",
        f"**{_plain(found['verdict']['text'])}**",
        _bullets(found["verdict"]["reasons"]),
        *(f"{step['why']}:\n\n```bash\n{step['command']}\n```" for step in found["next"]),
        "## Losses",
        _markdown(*table(found)),
        _READING,
        _bullets(notes(found)),
        "## Transfer",
        "The LoRA of a row's task on the rows of a column's task: loss minus the base model's, nats; negative helps.",
        _markdown(["LoRA of", *tasks], [[a, *(f"{against[a][b]:+.3f}" for b in tasks)] for a in tasks]),
        "![transfer](transfer.png)",
        "## Conflict",
        "Cosine of the tasks' gradients by the shared LoRA's parameters, before training → after; on the diagonal that "
        "of two halves of one task's rows, which is what noise leaves of 1. Where a training has come to rest, the "
        "gradients of its tasks cancel, so that two tasks then show -1 whatever they are: read the first number too.",
        _markdown(["task", *tasks], [[a, *(f"{start[a][b]:+.2f} → {end[a][b]:+.2f}" for b in tasks)] for a in tasks]),
        "![conflict](conflict.png)",
        "## Receipt",
        _bullets(
            [
                f"made by `{receipt['command']}`, finished {receipt['finished']}, "
                f"{minutes(receipt['wall_seconds'])} in the last call",
                f"code: {commit_words(receipt['git'])}",
                f"machine: {receipt['machine']['processor']}, {receipt['machine']['cores']} cores",
            ]
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown([_plain(cell) for cell in header], [[_plain(cell) for cell in row] for row in rows])


def _plain(text: str) -> str:
    """A text of Markdown in which the name of a task is no HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
