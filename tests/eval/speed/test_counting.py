"""What is counted of a step, against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.speed import shapes
from eval.speed.count import LIMITS, after_the_layers, table
from eval.speed.counting import Count, ReadsBackError, count, graph_breaks, with_triton
from eval.speed.shapes import BLOCK, FEED_FORWARD
from moelora.ops.factors import Factors
from moelora.ops.mixture_linear import mixture_linear
from moelora.routing.batch import Tokens

RESULTS = Path(__file__).parents[3] / "eval" / "results" / "speed"


class Two(nn.Module):
    """A frozen linear, an activation, a trained linear and dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 8, bias=False).requires_grad_(False)
        self.trained = nn.Linear(8, 4, bias=False)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.trained(self.dropout(F.silu(self.frozen(x))))
        return y


def count_two(p: float) -> Count:
    module = Two(p).to("meta")
    x = torch.empty(5, 6, device="meta", requires_grad=True)
    return count(module, lambda: module(x))


def test_counts_by_hand() -> None:
    """Forward: two products, silu. Backward: W and x of the trained one, silu, x of the frozen one."""
    found = count_two(0.0)
    assert (found.forward, found.backward, found.syncs) == (3, 4, 0)
    assert found.saved == 4 * 5 * (8 + 8)  # what goes into silu and what comes out
    assert found.flops == 2 * 5 * (2 * 6 * 8 + 3 * 8 * 4)


def test_dropout_is_one_launch_each_way_and_keeps_a_mask_of_bytes() -> None:
    with_dropout, without = count_two(0.5), count_two(0.0)
    assert with_dropout.launches == without.launches + 2
    assert with_dropout.saved == without.saved + 5 * 8  # the dropped tensor takes the place of silu's


def test_what_is_read_back_from_the_device_is_named() -> None:
    ids = torch.zeros(2, dtype=torch.long, device="meta")
    packed_BS = torch.zeros(1, 6, dtype=torch.long, device="meta")
    tokens = Tokens(packed_BS == 0, packed_BS, {"task_ids": ids}, {})
    with pytest.raises(ReadsBackError, match=r"read back at moelora/routing/batch.py:\d+"):
        count(nn.Identity(), lambda: tokens.fact_N("task_ids"))


def test_views_and_allocations_are_no_launches() -> None:
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    found = count(nn.Identity(), lambda: x.view(6, 4).t()[:2].expand(3, 2, 6))
    assert found.forward == 0


@pytest.mark.parametrize("preset", ["sira", "mor1e", "smora", "mixlora_switch", "mixlora_dynamic"])
def test_a_mixture_is_one_graph(preset: str) -> None:
    """Of those with a capacity, with an embedding of the prompt, with a bias; `eval.speed --count` looks at all."""
    assert graph_breaks(shapes.mixture(shapes.base("SmolLM2-135M", "cpu"), preset).forward(BLOCK, 1, 64)) == 0


def test_graph_breaks_are_counted() -> None:
    x = torch.ones(3, requires_grad=True)

    def broken() -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    assert graph_breaks(broken) == 1
    assert graph_breaks(lambda: x * 2 + 1) == 0


@pytest.mark.parametrize(("O", "sums"), [(40, 2), (8192, 0)])
def test_a_kernel_of_triton_is_one_launch(O: int, sums: int) -> None:
    """Forward one; backward two, and the sum over parts of the tokens and its rounding where blocks alone are few."""
    T, D, E, R = 63, 32, 3, 2
    with torch.device("meta"):
        a = nn.Parameter(torch.empty(E, R, D, dtype=torch.bfloat16))
        b = nn.Parameter(torch.empty(E, O, R, dtype=torch.bfloat16))
        x, gates = torch.empty(T, D, dtype=torch.bfloat16, requires_grad=True), torch.empty(T, E)
    module = nn.ParameterList([a, b])
    with with_triton():
        found = count(module, lambda: mixture_linear(x, Factors(a, b, 2.0), gates))
    assert (found.forward, found.backward) == (1, 2 + sums)
    assert found.saved == 2 * T * (D + E * R) + 4 * T * E
    assert found.flops == 3 * 2 * T * E * R * (D + O)


def mixlora(shape: str, batch: int, length: int, **words: Any) -> tuple[Count, Count]:
    """The counts of its feed-forward block, and of LoRA's."""
    base = shapes.base(shape)
    adapted = shapes.mixture(base, "mixlora", **words)
    peer = shapes.lora(base, shapes.ranks_of(adapted), shapes.dropout_of(adapted))
    mine, theirs = (count(each.model, each.forward(FEED_FORWARD, batch, length)) for each in (adapted, peer))
    return mine, theirs


@pytest.mark.parametrize("shape", ["SmolLM2-135M", "Llama-3-8B"])
def test_mixlora_on_a_gpu_is_within_what_was_asked_for(shape: str) -> None:
    mine, theirs = mixlora(shape, 4, 1024)
    for what, ratio in mine.over(theirs).items():
        assert ratio <= LIMITS[what], what
    assert mine.syncs == 0


@pytest.mark.parametrize("preset", ["poly", "moelora_task", "mor1e"])
def test_routing_by_sequence_does_not_wait_for_the_device(preset: str) -> None:
    adapted = shapes.mixture(shapes.base("SmolLM2-135M"), preset)
    assert count(adapted.model, adapted.forward(BLOCK, 2, 16)).syncs == 0


@pytest.mark.parametrize("preset", ["mixlora", "sira", "smora"])
def test_what_comes_after_the_layers_does_not_depend_on_how_many_there_are(preset: str) -> None:
    few, many = (after_the_layers(preset, layers) for layers in (2, 3))
    assert few == many
    assert few is not None
    assert 15 < few < 80


def test_launches_do_not_depend_on_the_mixture_or_the_tokens() -> None:
    first, _ = mixlora("SmolLM2-135M", 4, 1024)
    second, _ = mixlora("SmolLM2-135M", 3, 100, num_experts=32, top_k=3, r=4)
    assert first.launches == second.launches


def test_the_committed_counts_are_those_of_today() -> None:
    results = json.loads((RESULTS / "counts.json").read_text())
    config = results["receipt"]["config"]
    mine, theirs = mixlora("Qwen3-4B", config["sequences"], config["length"])
    where = ("Qwen3-4B", "mixlora", FEED_FORWARD)
    [row] = [row for row in results["rows"] if (row["shape"], row["preset"], row["part"]) == where]
    assert (row["count"]["flops"], row["lora"]["flops"]) == (mine.flops, theirs.flops)
    assert row["count"]["saved"] == pytest.approx(mine.saved, rel=0.01)
    written = table(results["rows"], results["graph_breaks"], "Qwen3-4B", FEED_FORWARD)
    assert written in (RESULTS / "counts.md").read_text()
