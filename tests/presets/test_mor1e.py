"""MoR1E: a layer is its equation, its diagonal is dense rank-1 experts, its centroids are those of the training set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import moelora
from moelora import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.training.centroids import k_means
from tests.adapters import adapted, outputs, shake, small_config, tuner_layers
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close, gradients

NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("words", [{}, {"num_centroids": 6}, {"rows": 3, "columns": 3, "diagonal": True}], ids=str)
def test_a_layer_equals_the_reference(words: dict[str, Any]) -> None:
    """Forward and the gradient of the input and of all tensors; sequences of unlike embeddings."""
    model = adapted("mor1e", **words)
    config, layer = model.peft_config["default"].experts, tuner_layers(model)[NAME]
    router = layer.moelora_router["default"]
    for scalar in (router.omega, layer.moelora_gate["default"].weight):
        scalar.data.fill_(0.004)  # times 100 within the sigmoid
    centroids_CH = router.tensor("centroids")
    assert router.has("map") == (words.get("num_centroids") != 6)
    x = torch.randn(2, 4, 36).requires_grad_()
    h_NH = torch.randn(2, 36)
    leaves = {"x": x, "A": layer.moelora_A["default"].weight, "B": layer.moelora_B["default"].weight}
    leaves |= {"gate": layer.moelora_gate["default"].weight, "weight": router.weight, "omega": router.omega}
    leaves |= {"map": router.map} if router.has("map") else {}

    def naive() -> Tensor:
        x_TD = x.flatten(0, 1)
        rows = [
            reference.intuition_weights(
                router.weight @ x_D, router.omega, h_NH[t // 4], centroids_CH, leaves.get("map")
            )
            for t, x_D in enumerate(x_TD)
        ]
        weights = torch.stack(rows)
        weights = torch.diag_embed(weights) if config.diagonal else weights.view(-1, config.rows, config.columns)
        delta_TO = reference.grid_of_pairs(
            x_TD, leaves["A"], leaves["B"], weights, leaves["gate"], diagonal=config.diagonal
        )
        return layer.base_layer(x) + delta_TO.view(2, 4, -1)

    def ours() -> Tensor:
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda *args: seen.append(args[2]))
        with moelora.batch_facts(instance_embedding=h_NH):
            embeds = torch.zeros(2, 4, 36)
            inner = layer.base_layer  # the layer is called at its place in a run, on an input of our own
            replaced = layer.register_forward_pre_hook(lambda *args: (x,))
            model.get_base_model()(inputs_embeds=embeds)
            replaced.remove()
        handle.remove()
        assert inner is layer.base_layer
        return seen[0]

    found, expected = gradients(ours, leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-5)
        assert tensor.abs().max() > 0, name


def test_the_diagonal_is_dense_rank_1_experts_up_to_its_constants() -> None:
    """SMoRA's form: `sum_e g_e b_e (a_e . x)`, with g = 32 * 1/2 * softmax and sg = 1/2 where the intuition is off."""
    model = adapted("mor1e", rows=4, columns=4, diagonal=True, num_centroids=4)
    layer = tuner_layers(model)[NAME]
    router, gate = layer.moelora_router["default"], layer.moelora_gate["default"].weight
    router.omega.data.zero_()
    gate.data.zero_()
    router.tensor("centroids").data[:, 18:] = 0  # at right angles with the embedding below
    dense = get_peft_model(
        tiny_model(),
        MoeLoraConfig(
            experts={"kind": "lora", "num_experts": 4, "r": 1, "lora_alpha": 32 * 0.5 * 0.5},
            selection="dense",
            target_modules=[NAME],
            task_type="CAUSAL_LM",
        ),
    )
    other = tuner_layers(dense)[NAME]
    other.moelora_A["default"].weight.data = layer.moelora_A["default"].weight.data.unsqueeze(1).clone()
    other.moelora_B["default"].weight.data = layer.moelora_B["default"].weight.data.t().unsqueeze(2).clone()
    other.moelora_router["default"].weight.data = router.weight.data.clone()
    x, found = torch.randn(1, 5, 36), []
    h_NH = torch.cat([torch.zeros(1, 18), torch.randn(1, 18)], 1)
    for each, owner in ((layer, model), (other, dense)):
        each.register_forward_pre_hook(lambda *args: (x,))
        each.register_forward_hook(lambda *args: found.append(args[2]))
        with torch.no_grad(), moelora.batch_facts(instance_embedding=h_NH):
            owner.get_base_model()(inputs_embeds=torch.zeros(1, 5, 36))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_it_starts_with_equal_weights_and_half_of_the_scale() -> None:
    """R = 32 / 2 / E and the intuition, sg = 1/2: at E = 32 the softmax' share is 0.5, as in the authors' code."""
    config = MoeLoraConfig.from_preset("mor1e", target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    moelora.fit_centroids(model, embeddings=torch.randn(50, 36))
    with moelora.record_routing(model) as recorder:
        outputs(model)
    cosines = recorder.records[0].routing.weights_TK - 0.5
    assert cosines.abs().max() <= 2.0
    assert config.experts.scaling == 1
    layer = next(iter(tuner_layers(model).values()))
    assert not layer.moelora_gate["default"].weight.any()
    assert not layer.moelora_router["default"].weight.any()


@pytest.mark.parametrize("embedding", ["input", "hidden"])
def test_the_centroids_are_fitted_to_the_prompts_and_saved_once(embedding: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), small_config("mor1e", embedding=embedding))
    examples = [
        {"input_ids": row.tolist(), "labels": [-100] * 6 + row[6:].tolist()} for row in torch.arange(3, 93).view(10, 9)
    ]
    centroids_CH = moelora.fit_centroids(model, examples)
    base, rows = tiny_model(), torch.tensor([example["input_ids"][:6] for example in examples])
    with torch.no_grad():
        states = base.model(rows).last_hidden_state if embedding == "hidden" else base.get_input_embeddings()(rows)
    torch.testing.assert_close(centroids_CH, k_means(states.mean(1), 5), rtol=1e-4, atol=1e-5)
    shake(model)
    expected = outputs(model.eval())
    model.save_pretrained(str(tmp_path))
    stored = [name for name in model.state_dict() if "centroids" in name]
    assert stored == ["base_model.model.model.layers.0.self_attn.q_proj.moelora_router.default.centroids"]
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    assert torch.equal(outputs(loaded), expected)


def test_k_means_finds_the_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(4)
    points = centers.repeat_interleave(20, 0) + 0.05 * torch.randn(80, 4, generator=generator)
    found = k_means(points, 4)
    assert sorted(found.argmax(1).tolist()) == [0, 1, 2, 3]
    assert torch.allclose(found.max(1).values, torch.ones(4), atol=0.01)
    assert torch.equal(found, k_means(points, 4))
    with pytest.raises(ConfigError, match="there are 2 different embeddings for 3 centroids"):
        k_means(torch.eye(4)[[0, 1, 0, 1]], 3)


def test_without_centroids_it_says_what_to_do() -> None:
    model = get_peft_model(tiny_model(), small_config("mor1e"))
    with pytest.raises(ConfigError, match=r"no values yet.*moelora\.fit_centroids"):
        model(**tiny_batch())


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match=r"experts\.num_experts is 5; allowed: the number of pairs, 6"):
        MoeLoraConfig(experts={"kind": "grid", "num_experts": 5, "rows": 2, "columns": 3})
    with pytest.raises(ConfigError, match="columns is 8; allowed: the number of rows"):
        MoeLoraConfig.from_preset("mor1e", diagonal=True)
    with pytest.raises(ConfigError, match="Without a router there is no weight"):
        MoeLoraConfig(experts="grid", placement={"kind": "linear", "unrouted_modules": ".*"})
    model = adapted("mixlora")
    with pytest.raises(ConfigError, match="has 'linear' scores; allowed: one with 'intuition' scores"):
        moelora.fit_centroids(model, [])
    model = get_peft_model(tiny_model(), small_config("mor1e"))
    with pytest.raises(ConfigError, match="examples or embeddings"):
        moelora.fit_centroids(model)
    with pytest.raises(ConfigError, match=r"the embeddings are \[7, 9\]; allowed: \[sequences, 36\]"):
        moelora.fit_centroids(model, embeddings=torch.randn(7, 9))
    model = adapted("mor1e")
    with moelora.batch_facts(instance_embedding=torch.randn(3, 9)), pytest.raises(ConfigError, match="9 features"):
        model(**tiny_batch())
