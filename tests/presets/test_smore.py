"""S'MoRE: a layer is its equation, read off the tree node by node; one layer of it is a mixture of LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig, balance_losses, record_routing
from moelora.errors import ConfigError
from tests.adapters import adapted, outputs, small_config, tuner_layers
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close, gradients

NAME = "model.layers.0.mlp.up_proj"


def named_tensors(layer: Any) -> dict[str, Tensor]:
    return {
        f"{first}.{name}": part.get_parameter(name)
        for first, part in layer.parts["default"].items()
        for name in part.declared
    }


def children(config: Any, t: dict[str, Tensor], x_D: Tensor, chain: list[tuple[int, int]]) -> dict[int, Tensor]:
    """The chosen children of the node at the end of a chain of (layer, expert), with their weights."""
    layer = len(config.experts.sizes) - 1 - len(chain)
    down = t["router.down"] @ x_D + t["router.down_shift"]
    is_noisy = config.scores.noise
    keys = {n: x / x.norm(dim=1, keepdim=True) if is_noisy else x for n, x in t.items() if "keys" in n}
    known = torch.cat([down, *(keys[f"router.keys_{above}"][expert] for above, expert in chain)])
    hidden = (t[f"router.in_{layer}"] @ known + t[f"router.in_shift_{layer}"]).clamp_min(0)
    q = t[f"router.out_{layer}"] @ hidden + t[f"router.out_shift_{layer}"]
    logits = keys[f"router.keys_{layer}"] @ (q / q.norm() if is_noisy else q)
    probs = logits.softmax(0)
    fan = config.selection.fan_out[layer]
    if fan == len(probs):
        return dict(enumerate(probs))
    best = probs.argsort(descending=True)[:fan].tolist()
    if fan == 1 and is_noisy:
        return {best[0]: logits[best[0]]}
    total = sum(probs[n] for n in best) if fan > 1 else 1.0
    return {n: probs[n] / total for n in best}


def node(config: Any, t: dict[str, Tensor], x_D: Tensor, chain: list[tuple[int, int]]) -> Tensor:
    """x of the node at the end of a chain, which is the root for an empty one."""
    act = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}[config.experts.activation]
    layer = len(config.experts.sizes) - 1 - len(chain)
    total: Any = 0.0
    for n, alpha in children(config, t, x_D, chain).items():
        own = t[f"B.layer_{layer}"][n] @ (t[f"A.layer_{layer}"][n] @ x_D)
        below = node(config, t, x_D, [*chain, (layer, n)]) if layer else None
        if config.experts.position == "all":
            total = total + alpha * act(own if below is None else own + t[f"W.layer_{layer}"] @ below)
        else:
            total = total + alpha * own + (0.0 if below is None else t[f"W.layer_{layer}"] @ act(below))
    return total


CASES: dict[str, dict[str, Any]] = {
    "two layers": {},
    "three layers": {"sizes": [2, 3, 2], "fan_out": [1, 2, 1]},
    "dense": {"fan_out": None, "activation": "relu"},
    "child": {"position": "child", "lora_alpha": 3},
    "noisy": {"noise": True, "fan_out": [1, 2]},
    "one layer": {"sizes": [4], "fan_out": [2]},
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_equals_the_reference(case: str) -> None:
    """Forward and the gradient of the input and of every tensor of experts and router."""
    model = adapted("smore", **CASES[case])
    config, layer = model.peft_config["default"], tuner_layers(model)[NAME]
    tensors = named_tensors(layer)
    x_TD = torch.randn(6, 36).requires_grad_()
    scaling = 1.5 if "lora_alpha" in CASES[case] else 1.0

    def naive() -> Tensor:
        rows = [scaling * tensors["W.proj"] @ node(config, tensors, x_D, []) for x_D in x_TD]
        return layer.base_layer(x_TD) + torch.stack(rows)

    leaves = {"x": x_TD, **{name: tensor for name, tensor in tensors.items() if "noise" not in name}}
    found, expected = gradients(lambda: layer(x_TD), leaves), gradients(naive, leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-5)


def test_one_layer_without_activation_is_a_mixture_of_lora() -> None:
    """With W_proj B_e as B_e, given the same weights."""
    model = adapted("smore", sizes=[4], fan_out=[2], activation="identity", target_modules=["up_proj"])
    layer = tuner_layers(model)[NAME]
    tensors = named_tensors(layer)
    mixture = get_peft_model(
        tiny_model(),
        MoeLoraConfig(
            experts={"kind": "lora", "num_experts": 4, "r": 2, "lora_alpha": 2},
            scores={"kind": "tree_keys", "sizes": [4], "features": 5},
            selection={"kind": "tree_top", "sizes": [4], "fan_out": [2]},
            target_modules=["up_proj"],
            task_type="CAUSAL_LM",
        ),
    ).eval()
    for path, other in tuner_layers(mixture).items():
        source = named_tensors(tuner_layers(model)[path])
        other.moelora_A["default"].weight.data = source["A.layer_0"].detach().clone()
        other.moelora_B["default"].weight.data = (source["W.proj"] @ source["B.layer_0"]).detach().clone()
        for name, parameter in other.moelora_router["default"].named_parameters():
            parameter.data = source[f"router.{name}"].detach().clone()
    assert tensors["W.proj"].abs().max() > 0
    torch.testing.assert_close(outputs(model), outputs(mixture), rtol=1e-5, atol=1e-6)


def test_children_of_a_node_that_was_not_chosen_have_no_weight() -> None:
    model = adapted("smore")
    with torch.no_grad(), record_routing(model) as recorder:
        model(**tiny_batch())
    for record in recorder.records:
        gates_TE = record.routing.gates_TE()
        top, below = gates_TE[:, :4], gates_TE[:, 4:].unflatten(1, (4, 3))
        assert torch.equal((top > 0).sum(-1), torch.full((33,), 3))
        torch.testing.assert_close(top.sum(-1), torch.ones(33))
        torch.testing.assert_close(below.sum(-1), (top > 0).float())
        assert torch.equal((below > 0).sum(-1), 2 * (top > 0).long())


def test_its_loss_is_1_at_balance_and_that_of_the_layers_of_the_tree() -> None:
    model = adapted("smore").train()
    (choice,) = model.peft_config["default"].balance
    with record_routing(model) as recorder:
        model(**tiny_batch())
    (loss,) = balance_losses(recorder.records, [choice])
    terms = []
    for record in recorder.records:
        probs = record.routing.probs_TE * 5  # five nodes have children
        chosen, valid = record.routing.assigned_TK, record.valid_T
        assert chosen is not None
        top = chosen[valid][:, :4]
        f_top = top.float().sum(0) / top.sum()
        below, p_below = chosen[valid][:, 4:].unflatten(1, (4, 3)), probs[valid][:, 4:].unflatten(1, (4, 3))
        f_below = below.float().sum((0, 1)) / below.sum()
        p_mean = (p_below * top.unsqueeze(-1)).sum(1) / 3
        of_tree = 4 * (f_top * probs[valid][:, :4].mean(0)).sum() + 3 * (f_below * p_mean.mean(0)).sum()
        terms.append(of_tree / 2)
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
    assert 0.9 < loss < 4
    loss.backward()
    router = tuner_layers(model)[NAME].moelora_router["default"]
    assert all(parameter.grad is not None for parameter in router.parameters())


def test_it_starts_as_the_paper_says() -> None:
    layer = tuner_layers(get_peft_model(tiny_model(), small_config("smore")))[NAME]
    tensors = named_tensors(layer)
    assert not tensors["W.proj"].any()
    assert tensors["W.proj"].shape == (52, 14)  # 3 * 2 leaves' ranks, and 4 * 2 above
    assert tensors["W.layer_1"].shape == (14, 6)
    keys = tensors["router.keys_1"]
    assert 0 <= keys.min() < keys.max() <= 1


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match=r"fan_out is \[2, 5\]; allowed: for each layer at most"):
        MoeLoraConfig.from_preset("smore", fan_out=[2, 5])
    with pytest.raises(ConfigError, match=r"sizes is \[\]"):
        MoeLoraConfig.from_preset("smore", sizes=[])
    with pytest.raises(ConfigError, match="selection is .*'tree_top' of the sizes"):
        MoeLoraConfig(experts="residual_tree")
    with pytest.raises(ConfigError, match="scores is .*'tree_keys' of the sizes"):
        MoeLoraConfig(experts={"kind": "lora", "num_experts": 20}, selection="tree_top")
    assert MoeLoraConfig.from_preset("smore", fan_out=None).balance == []
