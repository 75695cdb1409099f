"""One LoRA for a whole mixture: what it is, and what it loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moelora
from moelora.compose.editing.low_rank import cut
from moelora.errors import ConfigError, ExportError
from moelora.export import distill_lora
from moelora.export.output import Lora
from tests.adapters import adapted, adapted_linears, outputs, snapshot, stacks
from tests.conftest import tiny_batch, tiny_model
from tests.export.mixtures import RANKS, base_folder, composition, saved, with_lora

RANK = 4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder(tmp_path / "base")


def deltas(model: Any) -> dict[str, Tensor]:
    """What a PEFT LoRA adds to each weight."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach()
    return found


def mean_gates(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The naive mean weight of each expert over valid tokens, one token at a time."""
    rows: dict[str, list[Tensor]] = {}
    for batch in batches:
        with moelora.record_routing(model) as listener, torch.no_grad():
            model(**batch)
        for record in listener.records:
            for weights, valid in zip(record.routing.gates_TE(), record.valid_T, strict=True):
                if valid:
                    rows.setdefault(record.layer, []).append(weights)
    return {layer: torch.stack(each).mean(0) for layer, each in rows.items()}


def nearest(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()


@pytest.mark.parametrize("preset", ["sira", "molora", "smora", "hydralora", "adamole", "mixlora"])
@pytest.mark.parametrize("with_data", [True, False])
def test_it_is_the_nearest_of_its_rank_to_the_usage_weighted_sums(
    tmp_path: Path, base: Path, preset: str, with_data: bool
) -> None:
    model = adapted(preset)
    batches = [tiny_batch(seed=1), tiny_batch(seed=2)]
    words: dict[str, Any] = {"train": batches} if with_data else {}
    adapter = model if with_data else saved(model, tmp_path / "adapter")
    found = distill_lora(adapter, tmp_path / "out", rank=RANK, base=str(base), **words)
    E = model.peft_config["default"].experts.num_experts
    usage = mean_gates(model, batches) if with_data else {}
    exported = deltas(with_lora(base, tmp_path / "out"))
    kept = total = 0.0
    for name, (path, layer, role) in adapted_linears(model).items():
        a_ERD, b_EOR = (stack.detach() for stack in stacks(layer, role))
        if not layer.routers:
            u_E = torch.ones(1)
        elif with_data:
            u_E = usage[path] / (usage[path].sum() if preset == "mixlora" else 1)
        else:
            # uniform probabilities: of SiRA's raw 1/4 each, two are chosen
            u_E = torch.full((E,), (0.5 if preset == "sira" else 1.0) / E)
        scaling = model.peft_config["default"].scaling
        whole = sum(u * scaling * b @ a for u, a, b in zip(u_E, a_ERD.expand(len(u_E), -1, -1), b_EOR, strict=True))
        expected = nearest(whole, RANK)
        torch.testing.assert_close(exported.pop(name), expected, atol=1e-5, rtol=1e-4)
        kept, total = kept + float(expected.square().sum()), total + float(whole.square().sum())
    assert exported == {}
    assert found.kept == pytest.approx(kept / total, abs=1e-4)
    assert found.scores == {}


def test_truncation_is_exact_at_full_rank_and_drops_what_is_not_there() -> None:
    a_MD, b_OM = torch.randn(5, 7), torch.randn(9, 5)
    b_OM[:, 4] = b_OM[:, 3]  # a product of rank 4
    found = cut(a_MD, b_OM, 6)
    assert (found.a_RD.shape, found.b_OR.shape) == ((6, 7), (9, 6))
    torch.testing.assert_close(found.b_OR @ found.a_RD, b_OM @ a_MD, atol=1e-5, rtol=1e-5)
    assert found.squared_norm == pytest.approx(float((b_OM @ a_MD).square().sum()), rel=1e-5)
    assert Lora(found.a_RD, found.b_OR).trimmed().rank == 4


def test_a_fixed_mix_is_kept_exactly_at_the_sum_of_ranks(tmp_path: Path, base: Path) -> None:
    model = composition(base, scores={"kind": "constant", "weights": [0.5, 0.3, -0.2]})
    found = distill_lora(saved(model, tmp_path / "adapter"), tmp_path / "out", rank=sum(RANKS))
    assert found.kept == pytest.approx(1)
    torch.testing.assert_close(outputs(with_lora(base, tmp_path / "out")), outputs(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def make_alike(model: Any) -> None:
    """Experts that have most in common, as those of a trained mixture do."""
    for name, tensor in model.named_parameters():
        if ".moelora_A." in name or ".moelora_B." in name:
            tensor.copy_(tensor[:1] + 0.3 * tensor)


def naive_score(model: Any, mixture: Any, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Loss and KL(mixture || model), token by token in fp64."""
    losses, kls = [], []
    for batch in batches:
        with torch.no_grad():
            logits, of_mixture = model(**batch).logits.double(), mixture(**batch).logits.double()
        for row, labels in enumerate(batch["labels"]):
            for place, label in enumerate(labels[1:]):
                if label >= 0:
                    ours, theirs = logits[row, place].softmax(-1), of_mixture[row, place].softmax(-1)
                    losses.append(-ours[label].log())
                    kls.append((theirs * (theirs / ours).log()).sum())
    return float(torch.stack(losses).mean()), float(torch.stack(kls).mean())


@pytest.mark.parametrize("preset", ["sira", "mixlora"])
def test_scores_are_those_of_base_mixture_and_the_lora_that_is_written(tmp_path: Path, base: Path, preset: str) -> None:
    model = adapted(preset)
    make_alike(model)
    before, active = snapshot(model), model.active_adapters
    held_out = [tiny_batch(batch_size=6, seed=3), tiny_batch(batch_size=6, seed=4)]
    words: dict[str, Any] = {"rank": RANK, "train": [tiny_batch(batch_size=6, seed=s) for s in range(10, 30)]}
    words |= {"held_out": held_out, "base": str(base)}
    found = distill_lora(model, tmp_path / "out", **words)
    trained = distill_lora(model, tmp_path / "trained", steps=60, **words)
    assert snapshot(model) == before
    assert model.active_adapters == active
    labels = torch.stack([batch["labels"][:, 1:] for batch in held_out])
    assert found.num_tokens == int((labels != -100).sum())
    models = {
        "base model": tiny_model(),
        "mixture": model,
        "LoRA of rank 4": with_lora(base, tmp_path / "out"),
        "after 60 steps": with_lora(base, tmp_path / "trained"),
    }
    assert list(trained.scores) == list(models)
    assert list(found.scores) == list(models)[:3]
    for name, each in models.items():
        loss, kl = naive_score(each, model, held_out)
        assert trained.scores[name].loss == pytest.approx(loss, abs=1e-4)
        assert trained.scores[name].kl == pytest.approx(kl, abs=1e-4)
    by_name = {name: score.kl for name, score in trained.scores.items()}
    assert by_name["mixture"] == pytest.approx(0, abs=1e-6)
    assert by_name["after 60 steps"] < by_name["LoRA of rank 4"] < by_name["base model"]
    lines = trained.table().splitlines()
    assert lines[1] == f"On {found.num_tokens} held-out tokens:"
    last = trained.scores["after 60 steps"]
    assert lines[-1].split() == ["after", "60", "steps", f"{last.loss:.4f}", f"{last.kl:.4f}"]


def test_steps_lower_the_kl_on_the_training_rows_as_a_plain_loop_does(tmp_path: Path, base: Path) -> None:
    """The same steps by autograd on PEFT's own LoRA, from the same start."""
    model = adapted("sira")
    batch = tiny_batch(seed=1)
    words: dict[str, Any] = {"rank": RANK, "train": [batch], "base": str(base)}
    distill_lora(model, tmp_path / "start", **words)
    distill_lora(model, tmp_path / "end", steps=3, learning_rate=1e-2, **words)
    lora = with_lora(base, tmp_path / "start")
    parameters = [p.requires_grad_() for name, p in lora.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    chosen = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        target = model(**batch).logits[:, :-1][chosen].softmax(-1)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        optimizer.zero_grad()
        log = lora(**batch).logits[:, :-1][chosen].log_softmax(-1)
        F.kl_div(log, target, reduction="batchmean").backward()
        optimizer.step()
    for name, expected in deltas(lora).items():
        torch.testing.assert_close(deltas(with_lora(base, tmp_path / "end"))[name], expected, atol=1e-4, rtol=1e-3)


def test_task_ids_travel_with_the_batches(tmp_path: Path, base: Path) -> None:
    model = composition(base)
    batch = {**tiny_batch(), "task_ids": torch.tensor([1, 1, 1])}
    distill_lora(model, tmp_path / "out", rank=RANK, train=[batch], held_out=[batch])
    with moelora.batch_facts(task_ids=[1, 1, 1]):
        expected = outputs(model)
    torch.testing.assert_close(outputs(with_lora(base, tmp_path / "out")), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="task_ids"):
        distill_lora(model, tmp_path / "other", rank=RANK, train=[tiny_batch()])
    assert list(model.peft_config) == ["default"]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2, "steps": 5}, "no data to train on"),
        ({"rank": 2, "train": [{}]}, "needs a causal language model"),
        ({"rank": 2, "steps": -1}, "steps -1"),
    ],
)
def test_bad_words_are_refused(tmp_path: Path, base: Path, words: dict[str, Any], message: str) -> None:
    adapter = saved(composition(base), tmp_path / "adapter")
    with pytest.raises(ExportError, match=message):
        distill_lora(adapter, tmp_path / "out", **words)
    assert not (tmp_path / "out").exists()
