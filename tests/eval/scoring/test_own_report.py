from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.scoring.generation import RoutingCounts
from eval.scoring.heatmaps import RoutingMap, _panels
from eval.scoring.own_tables import at_floor, score_rows, verdict
from eval.scoring.own_tasks import OwnResults, TaskResult
from moelora.runs.tables import markdown, terminal
from moelora.runs.tasks import Problem


def results(**right: tuple[int, int]) -> OwnResults:
    """Results of models that have so many of 20 problems of each of two tasks right."""
    tasks = []
    for index, name in enumerate(("sums", "names")):
        problems = [Problem(name, "?", "!", {})] * 20
        task = TaskResult(name, problems, dropped=0, majority=0.25, prompts=[])
        task.scores = {model: [1.0] * count[index] + [0.5] * (20 - count[index]) for model, count in right.items()}
        tasks.append(task)
    return OwnResults(tasks, list(right))


def test_the_table_has_scores_floor_errors_and_the_paired_difference() -> None:
    header, rows = score_rows(results(base=(0, 2), LoRA=(10, 12), MixLoRA=(15, 12)))
    assert header == ["task", "n", "majority", "base", "LoRA", "MixLoRA", "MixLoRA - LoRA"]
    assert rows[0] == ["sums", "20", "25.0", "0.0 ± 0.0", "50.0 ± 11.5", "75.0 ± 9.9", "+25.0 ± 9.9"]
    assert rows[1] == ["names", "20", "25.0", "10.0 ± 6.9", "60.0 ± 11.2", "60.0 ± 11.2", "+0.0 ± 0.0"]
    assert rows[2] == ["mean", "40", "25.0", "5.0 ± 3.4", "55.0 ± 8.0", "67.5 ± 7.5", "+12.5 ± 5.0"]


def test_tables_are_aligned() -> None:
    header, rows = score_rows(results(base=(0, 2), MixLoRA=(15, 12)))
    lines = terminal(header, rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["task", "n", "majority", "base", "MixLoRA"]
    assert markdown(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ((15, 12), "MixLoRA is ahead"),
        ((10, 12), "no difference"),
        ((11, 12), "no difference"),
        ((4, 12), "LoRA is ahead"),
    ],
)
def test_the_verdict_follows_the_numbers(ours: tuple[int, int], words: str) -> None:
    assert words in verdict(results(base=(0, 0), LoRA=(10, 12), MixLoRA=ours))


def test_scores_at_the_floor_are_named() -> None:
    assert at_floor(results(base=(0, 0), LoRA=(5, 6), MixLoRA=(6, 6))) == (
        "Not above the most frequent answer: LoRA on sums."
    )
    assert at_floor(results(base=(0, 0), MixLoRA=(6, 6))) == ""


def counts(**layers: list[float]) -> RoutingCounts:
    return RoutingCounts({name: torch.tensor(values) for name, values in layers.items()}, tokens=7)


def test_routing_distance_is_the_share_of_choices_that_would_move() -> None:
    a = [counts(l2=[1.0, 1.0], l10=[2.0, 0.0]), counts(l2=[1.0, 1.0], l10=[0.0, 2.0])]
    b = [counts(l2=[4.0, 0.0], l10=[1.0, 1.0]), counts(l2=[4.0, 0.0], l10=[1.0, 1.0])]
    routing = RoutingMap.of({"a": a, "b": b})
    assert routing.layers == ["l2", "l10"]
    np.testing.assert_allclose(routing.loads, [[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]])
    np.testing.assert_allclose(routing.distances(), [[0, 0.25], [0.25, 0]])
    np.testing.assert_allclose(routing.noise, [0.5, 0])
    assert routing.tokens == [14, 14]


def test_routers_of_one_kind_share_a_panel() -> None:
    layers = ["m.layers.0.mlp.up_proj", "m.layers.0.attn.q_proj", "m.layers.1.mlp.up_proj", "m.layers.1.attn.q_proj"]
    assert _panels(layers) == {"mlp.up_proj": [0, 2], "attn.q_proj": [1, 3]}
