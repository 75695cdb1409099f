"""MOELoRA, Polytropon and MHR in a model: routing by the task, and one plain LoRA at a fixed task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig, batch_facts, record_routing
from moelora.errors import ConfigError, TargetError
from moelora.export import export_loras
from moelora.ops import reference
from tests.adapters import BY_TASK, adapted, expert_tensors, outputs, small_config, tuner_layers
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close, gradients

LAYER = "model.layers.1.mlp.down_proj"
TASKS = torch.tensor([2, 0, 2])

by_task = pytest.mark.parametrize("preset", BY_TASK)


def logits(model: Any, tasks: Any = TASKS) -> Tensor:
    with batch_facts(task_ids=tasks):
        return outputs(model)


@by_task
def test_a_layer_equals_the_reference(preset: str) -> None:
    """Forward and the gradient of the input, the factors and what is kept of the tasks."""
    model = adapted(preset)
    layer, config = tuner_layers(model)[LAYER], model.peft_config["default"]
    experts, router = expert_tensors(layer), layer.routers["default"]
    x_TD = torch.randn(4, 52).requires_grad_()
    leaves = {"x": x_TD, **experts, **{name: router.get_parameter(name) for name in router.declared}}

    def naive() -> Tensor:
        a_ERD, b_EOR = experts["A.weight"], experts["B.weight"]
        if preset == "moelora_task":
            gates_TE = (leaves["embedding"][1] @ leaves["weight"].t()).softmax(-1).expand(4, -1)
            return layer.base_layer(x_TD) + reference.mixture_linear(x_TD, a_ERD, b_EOR, gates_TE, config.scaling)
        Q = config.experts.num_splits
        z_QS = leaves["weight"][1].view(Q, -1).sigmoid()
        gates_TQS = (z_QS / (z_QS.sum(-1, keepdim=True) + 1e-12)).expand(4, -1, -1)
        a_QSRD, b_QSOR = (each.unflatten(0, (Q, -1)) for each in (a_ERD, b_EOR))
        return layer.base_layer(x_TD) + reference.poly_linear(x_TD, a_QSRD, b_QSOR, gates_TQS)

    def found() -> Tensor:
        given: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, inputs, output: given.append(output))
        swap = layer.register_forward_pre_hook(lambda module, inputs: (x_TD[None],))
        try:
            with batch_facts(task_ids=[1]):
                model(input_ids=torch.tensor([[3, 4, 5, 6]]), use_cache=False)
        finally:
            handle.remove()
            swap.remove()
        return given[0][0]

    got, expected = gradients(found, leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        assert_close(name, got[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["poly", "mhr"])
def test_polytropon_equals_pefts(preset: str) -> None:
    ours = adapted(preset)
    experts = ours.peft_config["default"].experts
    Q, S = experts.num_splits, experts.num_experts // experts.num_splits
    targets = sorted({name.rpartition(".")[2] for name in tuner_layers(ours)})
    config = peft.PolyConfig(
        r=experts.r, n_tasks=3, n_skills=S, n_splits=Q, target_modules=targets, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(tiny_model(), config).eval()
    sources = tuner_layers(ours)
    with torch.no_grad():
        for name, layer in tuner_layers(theirs).items():
            tensors, router = expert_tensors(sources[name]), sources[name].moelora_router["default"]
            layer.poly_lora_A["default"].copy_(tensors["A.weight"].unflatten(0, (Q, S)).transpose(-1, -2))
            layer.poly_lora_B["default"].copy_(tensors["B.weight"].unflatten(0, (Q, S)).transpose(-1, -2))
            layer.poly_router["default"].module_logits.copy_(router.get_parameter("weight"))
        expected = theirs(**tiny_batch(), task_ids=TASKS).logits
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=2e-6)
    assert (expected - outputs(tiny_model())).abs().max() > 1e-3


def test_the_scaling_of_moelora_is_that_of_the_total_rank() -> None:
    """Whatever the number of experts; and one router serves all layers."""
    layers = list(tuner_layers(adapted("moelora_task")).values())
    assert all(layer.routers["default"] is layers[0].moelora_router["default"] for layer in layers)
    config = MoeLoraConfig.from_preset("moelora_task", r=16, lora_alpha=32, num_experts=8)
    assert (config.experts.r, config.scaling) == (2, 2.0)


@by_task
def test_each_row_has_its_task(preset: str) -> None:
    model = adapted(preset)
    together = logits(model)
    assert (logits(model, [0, 0, 0])[0] - together[0]).abs().max() > 1e-4
    for row, task in enumerate(TASKS.tolist()):
        valid = tiny_batch()["attention_mask"][row].bool()
        torch.testing.assert_close(logits(model, [task] * 3)[row][valid], together[row][valid], rtol=1e-4, atol=1e-5)


@by_task
def test_at_a_fixed_task_it_is_one_plain_lora(preset: str, tmp_path: Path) -> None:
    """Exported, and used by PEFT alone."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = adapted(preset)
    export_loras(model, tmp_path / "out", base=str(tmp_path / "base"))
    rank = model.peft_config["default"].experts.r * (4 if preset == "moelora_task" else 1)
    for task in range(3):
        lora = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "out" / f"task-{task}")).eval()
        config = lora.peft_config["default"]
        assert isinstance(config, peft.LoraConfig)
        assert config.r == rank
        torch.testing.assert_close(outputs(lora), logits(model, [task] * 3), rtol=1e-4, atol=1e-5)


def test_one_skill_of_polytropon_is_that_lora() -> None:
    """A row of the table that leaves one skill: `B_s A_s x / r`."""
    model = adapted("poly")
    layer = tuner_layers(model)[LAYER]
    for each in tuner_layers(model).values():
        each.moelora_router["default"].weight.data[1] = torch.tensor([-200.0, -200.0, 200.0, -200.0])
    tensors = expert_tensors(layer)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    logits(model, [1, 1, 1])
    handle.remove()
    x, y = seen[0]
    delta = x @ tensors["A.weight"][2].t() @ tensors["B.weight"][2].t() / 3
    torch.testing.assert_close(y, layer.base_layer(x) + delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["poly", "mhr"])
def test_training_draws_once_for_each_sequence_and_site(preset: str) -> None:
    model = adapted(preset).train()
    with record_routing(model) as recorder:
        logits(model)
    draws = []
    for record in recorder.records:
        gates_BSE = record.routing.gates_TE().view(3, 11, -1)
        assert torch.equal(gates_BSE, gates_BSE[:, :1].expand_as(gates_BSE))
        groups = gates_BSE.unflatten(-1, (model.peft_config["default"].experts.num_splits, -1))
        torch.testing.assert_close(groups.sum(-1), torch.ones(groups.shape[:-1]))
        assert not torch.equal(gates_BSE[0, 0], gates_BSE[2, 0])  # both of task 2
        draws.append(gates_BSE[0, 0])
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws) == 14


@by_task
def test_task_ids_are_needed_and_checked(preset: str) -> None:
    model = adapted(preset)
    with pytest.raises(ConfigError, match="routes by task_ids, which the batch does not have"):
        outputs(model)
    for wrong in ([3, 0, 0], [-1, 0, 0], [0.5, 0, 0]):
        with pytest.raises(ConfigError, match=r"task_ids are \[.*allowed: (0 to 2, the tasks|one whole number)"):
            logits(model, wrong)


def test_bad_combinations_are_refused() -> None:
    with pytest.raises(ConfigError, match="r is 12; allowed: a multiple of 8 experts"):
        MoeLoraConfig.from_preset("moelora_task", r=12)
    with pytest.raises(ConfigError, match=r"placement.routers is 'per_site'.*one embedding and one gate"):
        MoeLoraConfig(scores="task_embedding", selection="dense")
    poly: dict[str, Any] = {"experts": "poly", "scores": "task_table", "selection": "dense"}
    with pytest.raises(ConfigError, match=r"placement is .*allowed: 'linear' without unrouted_modules"):
        MoeLoraConfig(**poly, placement="feed_forward")
    with pytest.raises(ConfigError, match=r"scores.groups is 1; allowed: num_splits \(2\)"):
        MoeLoraConfig(**{**poly, "experts": {"kind": "poly", "num_splits": 2}})
    model = tiny_model()
    before = set(dict(model.named_modules()))
    with pytest.raises(TargetError, match="36 inputs and 36 outputs, which num_splits=5 does not divide"):
        get_peft_model(model, small_config("mhr", num_splits=5))
    assert set(dict(model.named_modules())) == before
