"""Experts that are added to a trained mixture, and what they leave as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moelora import record_routing
from moelora.compose import add_experts, fit_centroid, fit_router_rows, from_loras
from moelora.errors import ComposeError, TargetError
from moelora.scores.base import RouterInput, Scored
from moelora.selection.top_k import TopK
from tests.compose.mixtures import loaded, logits, saved, saved_by_sequence, texts, train, weights
from tests.compose.test_split import trained_lora
from tests.conftest import tiny_model
from tests.routing.routers import every_token

NEW = 4
"""The number of the expert that is added to four."""


@pytest.mark.parametrize("length", [5, 19])
def test_with_renormalised_top_k_a_token_that_does_not_choose_the_new_expert_keeps_its_output(
    tmp_path: Path, length: int
) -> None:
    """Before training and after it; 5 and 19 tokens take two forms of the feed-forward operation.

    The mixture is in the last layer, so that a token's logits depend on its own choice alone. Up to a rounding: that of
    the router's matrix product depends on its number of rows.
    """
    where = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "layers_to_transform": [1]}
    old = saved(tmp_path / "old", "mixlora", **where)
    added = add_experts(old, tmp_path / "new")
    assert (added.before.num_experts, added.after.num_experts) == (4, 5)
    ids = texts(20, length)
    before, model = torch.cat(logits(loaded(old), ids)), loaded(tmp_path / "new", is_trainable=True)
    model.eval()
    for trained in (False, True):
        if trained:
            train(model, texts(4, 9, seed=9))
        with record_routing(model) as listener:
            after = torch.cat(logits(model, ids))
        chosen_BS = torch.stack([record.routing.load_TE()[:, NEW] for record in listener.records]) > 0
        assert 10 < int(chosen_BS.sum()) < chosen_BS.numel() - 10
        assert ((after - before).abs().amax(-1) > 1e-5).equal(chosen_BS)


def test_renormalised_weights_do_not_depend_on_what_is_not_chosen() -> None:
    logits_TE = torch.randn(200, 6)
    logits_TE[:, 5] -= 9

    def weights_of(E: int) -> Tensor:
        some_TE = logits_TE[:, :E]
        probs_TE = some_TE.softmax(-1)
        return select(TopK(k=2), Scored(some_TE, probs_TE, probs_TE, is_softmax=True))

    torch.testing.assert_close(weights_of(5), weights_of(6), rtol=1e-6, atol=0)
    raw_TE, more_TE = logits_TE[:, :5].softmax(-1), logits_TE.softmax(-1)
    assert (raw_TE.topk(2).values - more_TE.topk(2).values).abs().max() > 1e-5


def select(selection: TopK, scored: Scored) -> Tensor:
    x_TD = scored.logits_TE
    given = RouterInput(x_TD, every_token(1, len(x_TD)), x_TD.shape[1], {}, {"expert_dropout": 0.0}, training=False)
    return selection.select(scored, given).weights_TK


@pytest.mark.parametrize("preset", ["mixlora", "sira", "molora", "hydralora", "random_router"])
def test_training_moves_the_new_expert_and_its_row_alone(tmp_path: Path, preset: str) -> None:
    old = saved(tmp_path / "old", preset)
    added = add_experts(old, tmp_path / "new", count=2)
    model = loaded(tmp_path / "new", is_trainable=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert added.after.num_trainable == model.get_nb_trainable_parameters()[0]
    train(model, texts())
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    mixtures = {name for name in before if "moelora_" in name and ".mlp." in name}
    free = {name for name in mixtures if "_frozen" not in name}
    if preset == "hydralora":  # the A that all experts share stays
        free = {name for name in free if "moelora_A" not in name}
    if preset == "random_router":  # its router is not trained anyway
        free = {name for name in free if "router" not in name}
    assert {name for name in moved if ".mlp." in name} == free
    assert not any("_frozen" in name for name in moved)
    if preset == "mixlora":  # the plain LoRAs beside the mixtures stay too
        assert not any("self_attn" in name for name in moved)
    old_weights = weights(old)
    frozen = {name.replace(".default", ""): p for name, p in model.named_parameters() if "_frozen" in name}
    assert frozen
    for name, tensor in frozen.items():
        assert tensor.equal(old_weights[name.replace("_frozen", "")])


def test_a_new_row_is_the_mean_of_the_old_ones_and_never_the_first_choice(tmp_path: Path) -> None:
    old = saved(tmp_path / "old", "sira")
    add_experts(old, tmp_path / "new")
    rows = weights(tmp_path / "new")
    for name, tensor in weights(old).items():
        if "router" in name:
            torch.testing.assert_close(rows[name], tensor.mean(0, keepdim=True))
    with record_routing(model := loaded(tmp_path / "new")) as listener, torch.no_grad():
        model(input_ids=texts())
    first = torch.cat([record.routing.ids_TK[:, 0] for record in listener.records if record.routing.ids_TK is not None])
    assert len(first) > 500
    assert not (first == NEW).any()


@pytest.mark.parametrize("preset", ["molora", "hydralora"])
def test_start_at_the_mean_of_the_old_experts(tmp_path: Path, preset: str) -> None:
    old = saved(tmp_path / "old", preset)
    add_experts(old, tmp_path / "new", start="mean")
    before, after = weights(old), weights(tmp_path / "new")
    for name, b_EOR in before.items():
        if "moelora_B" not in name:
            continue
        a = name.replace("moelora_B", "moelora_A")
        mean_OD = torch.matmul(b_EOR, before[a]).mean(0)  # of a shared A it broadcasts
        new_OD = after[name][0] @ (after[a] if preset == "molora" else before[a])[0]
        u, s, vh = torch.linalg.svd(mean_OD)
        best_OD = u[:, :3] * s[:3] @ vh[:3]  # the best of rank 3, exact where A is shared
        torch.testing.assert_close(new_OD, best_OD, rtol=1e-4, atol=1e-5)


def test_start_as_a_copy(tmp_path: Path) -> None:
    old = saved_by_sequence(tmp_path / "old")
    add_experts(old, tmp_path / "new", start="two", names=["four"], rows={"centroids": torch.ones(1, 36)})
    before, after = weights(old), weights(tmp_path / "new")
    name = "base_model.model.model.layers.1.mlp.down_proj.moelora_B.weight"
    assert after[name][0].equal(before[name][1])
    experts = json.loads((tmp_path / "new/adapter_config.json").read_text())["experts"]
    assert (experts["names"], experts["ranks"]) == (["one", "two", "three", "four"], [3, 2, 3, 2])
    assert experts["sources"][3] == {"source": "b"}


def test_with_centroids_old_sequences_keep_their_expert_and_their_bits(tmp_path: Path) -> None:
    """The option of fixed keys: what is nearer to an old key than to the new one is what it was, trained or not."""
    old = saved_by_sequence(tmp_path / "old")
    ids = texts(40)
    centroid = fit_centroid(tiny_model(), [{"input_ids": ids[:2]}], "input")
    torch.testing.assert_close(centroid, tiny_model().get_input_embeddings()(ids[:2]).mean(1).mean(0, keepdim=True))
    add_experts(old, tmp_path / "new", names=["four"], rows={"centroids": centroid})
    before, model = logits(loaded(old), ids), loaded(tmp_path / "new", is_trainable=True)
    new_rows = torch.stack([row for row in ids if _expert(model, row) == 3])
    assert 0 < len(new_rows) < len(ids)
    train(model, new_rows)
    after = logits(model, ids)
    for row, a, b in zip(ids, after, before, strict=True):
        assert a.equal(b) == (_expert(model, row) != 3)


def _expert(model: Any, row: Tensor) -> int:
    with record_routing(model) as listener, torch.no_grad():
        model(input_ids=row.unsqueeze(0))
    ids = listener.records[0].routing.ids_TK
    assert ids is not None
    return int(ids[0, 0])


def _composed_by_centroids(folder: Path, **words: Any) -> Path:
    """Two LoRAs composed by the centroids of three rows each, which differ in one token."""
    rows = {
        name: [{"input_ids": [*texts(1, seed=seed)[0].tolist(), last]} for last in (1, 2, 3)]
        for seed, name in enumerate(("a", "b"), 20)
    }
    loras = {name: trained_lora(folder / name) for name in rows}
    router = {"kind": "centroids", "embedding": "input", "least": -1.0, **words}
    from_loras(tiny_model(), loras, router, examples=rows).save_pretrained(folder / "old")
    return folder / "old"


def _tensor(folder: Path, name: str) -> Tensor:
    return next(tensor for key, tensor in weights(folder).items() if key.endswith(name))


def test_a_composition_of_loras_that_sends_the_unknown_to_the_base_takes_one_more(tmp_path: Path) -> None:
    """Its new expert is trained, its old ones are not, and takes what is as near as the least strict of them asks."""
    old = _composed_by_centroids(tmp_path)
    centroid = fit_centroid(tiny_model(), [{"input_ids": texts(3, seed=22)}], "input")
    added = add_experts(old, tmp_path / "new", names=["c"], rows={"centroids": centroid})
    assert added.before.num_trainable == 0 < added.after.num_trainable
    before = _tensor(old, "threshold")
    assert _tensor(tmp_path / "new", "threshold").equal(torch.cat([before, before.min().view(1, 1)]))
    model = loaded(tmp_path / "new")
    assert _expert(model, texts(3, seed=22)[0]) == 2


def test_rows_of_the_new_expert_give_it_a_threshold_of_its_own(tmp_path: Path) -> None:
    """Its own rows are far apart, so that the least of the others' thresholds would leave them all with the base."""
    old = _composed_by_centroids(tmp_path, slack=0.5)
    ids = texts(3, seed=22)
    rows = fit_router_rows(tiny_model(), [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}], old, "c")
    h_ND = tiny_model().get_input_embeddings()(ids).mean(1).detach()
    torch.testing.assert_close(rows["centroids"], h_ND.mean(0, keepdim=True))
    center_1D = _tensor(old, "center")
    lowest = min(
        float(torch.cosine_similarity(h_ND[i] - center_1D, (h_ND.sum(0) - h_ND[i]) / 2 - center_1D)) for i in range(3)
    )
    assert float(rows["threshold"]) == pytest.approx(lowest - 0.5 * (1 - lowest), abs=1e-5)
    assert float(rows["threshold"]) < float(_tensor(old, "threshold").min())
    add_experts(old, tmp_path / "new", names=["c"], rows=rows)
    assert _tensor(tmp_path / "new", "threshold")[2].equal(rows["threshold"][0])
    model = loaded(tmp_path / "new")
    assert [_expert(model, row) for row in ids] == [2, 2, 2]


def test_rows_of_a_new_expert_are_looked_at_as_the_router_does(tmp_path: Path) -> None:
    """Without the earlier turns of a conversation, where the router leaves them out; no threshold where it has none."""
    ids = torch.tensor([[5, 9, 20, 21, 5, 9, 30, 31]])
    old = _composed_by_centroids(tmp_path, turn_start=[5, 9], unknown=False)
    rows = fit_router_rows(tiny_model(), [{"input_ids": ids}], old)
    assert list(rows) == ["centroids"]
    torch.testing.assert_close(
        rows["centroids"], tiny_model().get_input_embeddings()(ids[0, 4:]).detach().mean(0, keepdim=True)
    )


def test_rows_that_say_nothing_of_a_new_expert_are_refused(tmp_path: Path) -> None:
    old = _composed_by_centroids(tmp_path)
    one = [{"input_ids": texts(1, seed=22)}]
    with pytest.raises(ComposeError, match=r"expert 'c' has one row.*at least two rows"):
        fit_router_rows(tiny_model(), one, old, "c")
    with pytest.raises(ComposeError, match="no row to fit a centroid on"):
        fit_router_rows(tiny_model(), [], old)
    with pytest.raises(ComposeError, match=r"'linear' scores.*allowed: a mixture routed by centroids"):
        fit_router_rows(tiny_model(), one, saved(tmp_path / "linear", "mixlora"))
    same = torch.cat([texts(1, seed=20).repeat(3, 1), torch.tensor([[1], [2], [3]])], 1)
    with pytest.raises(ComposeError, match="experts 'a' and 'c' have the same centroid"):
        fit_router_rows(tiny_model(), [{"input_ids": same}], old, "c")
    with pytest.raises(TargetError, match="the base model is not the one"):
        fit_router_rows(tiny_model(seed=5), one, old)
    _without_fingerprint(old)
    with pytest.raises(ComposeError, match=r"36 features, and the base's embeddings 24"):
        fit_router_rows(tiny_model(hidden_size=24), one, old)
    broken = tiny_model()
    broken.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(ComposeError, match=r"embeddings of the prompts hold NaN or infinity in torch\.float32"):
        fit_router_rows(broken, one, old)


def _without_fingerprint(folder: Path) -> None:
    """As adapters of early versions are."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_fingerprint": None}))


def test_centroids_with_another_selection_have_no_threshold(tmp_path: Path) -> None:
    old = _composed_by_centroids(tmp_path, unknown=False)
    file = old / "adapter_config.json"
    words = json.loads(file.read_text())
    file.write_text(json.dumps({**words, "selection": {"kind": "top_k", "k": 2}}))
    assert list(fit_router_rows(tiny_model(), [{"input_ids": texts(3, seed=22)}], old)) == ["centroids"]


def test_an_expert_whose_prompts_are_all_alike_takes_them(tmp_path: Path) -> None:
    """Rounding leaves their cosine a little below 1 now and then, and the threshold lies below that."""
    old = _composed_by_centroids(tmp_path)
    for seed in range(40, 60):
        same = texts(1, seed=seed).repeat(3, 1)
        rows = fit_router_rows(tiny_model(), [{"input_ids": same}], old, "c")
        assert float(rows["threshold"]) <= 0.9999
    add_experts(old, tmp_path / "new", names=["c"], rows=rows)
    assert _expert(loaded(tmp_path / "new"), same[0]) == 2


def test_a_bias_of_all_experts_is_not_moved_any_more(tmp_path: Path) -> None:
    old = saved(tmp_path / "old", "smora")
    added = add_experts(old, tmp_path / "new")
    assert "biases are not moved any more" in added.notes[0]
    model = loaded(tmp_path / "new", is_trainable=True)
    name = next(name for name, _ in model.named_parameters() if name.endswith("router.default.bias"))
    before = model.get_parameter(name).clone()
    train(model, texts())
    assert model.get_parameter(name).equal(before)
    assert len(before) == 6


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        pytest.param("adamole", {}, "training would move router.threshold", id="a threshold of all experts"),
        pytest.param("lora", {}, "no mixture", id="no mixture"),
        pytest.param("molora", {"count": 0}, "count is 0", id="none"),
        pytest.param("molora", {"start": "best"}, "no expert 'best'; allowed: 0 to 3", id="no such start"),
        pytest.param("molora", {"start": 4}, "no expert 4", id="no such number"),
        pytest.param("molora", {"names": ["x"]}, "only numbers", id="names of the nameless"),
        pytest.param("molora", {"rows": {"centroids": torch.ones(1, 36)}}, "does not have", id="rows of no router"),
        pytest.param(None, {}, "rows of 'centroids' for the new experts are not given", id="no centroid"),
        pytest.param(
            None,
            {"rows": {"centroids": torch.ones(36)}},
            r"of shape \[36\], .* allowed: a tensor \[1, 36\]",
            id="shape",
        ),
        pytest.param(None, {"names": ["two"], "rows": {"centroids": torch.ones(1, 36)}}, "Taken: two", id="name clash"),
    ],
)
def test_what_cannot_be_added_leaves_nothing(
    tmp_path: Path, make: str | None, words: dict[str, Any], message: str
) -> None:
    old = saved_by_sequence(tmp_path / "old") if make is None else saved(tmp_path / "old", make)
    with pytest.raises(ComposeError, match=message):
        add_experts(old, tmp_path / "new", **words)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_modules_that_are_trained_whole_are_refused(tmp_path: Path) -> None:
    old = saved(tmp_path / "old", "molora", modules_to_save=["lm_head"])
    with pytest.raises(ComposeError, match="modules_to_save"):
        add_experts(old, tmp_path / "new")


def test_the_fixed_mix_keeps_its_weights(tmp_path: Path) -> None:
    """A uniform mix of four gives each 1/4; the fifth gets what the copied one has, and the others keep theirs."""
    old = saved(tmp_path / "old", "molora")
    words = json.loads((old / "adapter_config.json").read_text())
    words["scores"] = {"kind": "constant", "weights": None}
    (old / "adapter_config.json").write_text(json.dumps(words))
    tensors = {name: tensor for name, tensor in weights(old).items() if "router" not in name}
    (old / "adapter_model.safetensors").unlink()
    save_file(tensors, old / "adapter_model.safetensors", metadata={"format": "pt"})
    add_experts(old, tmp_path / "new")
    ids = texts(3)
    for a, b in zip(logits(loaded(tmp_path / "new"), ids), logits(loaded(old), ids), strict=True):
        assert a.equal(b)
