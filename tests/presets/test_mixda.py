"""MixDA: a layer is its equation, one decision holds for a sequence, and the second stage trains the gate alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig, record_routing
from moelora.errors import ConfigError
from moelora.ops import reference_adapters
from moelora.routing.batch import Tokens
from moelora.scores.mlp import last_tokens_N
from tests.adapters import adapted, adapter_tensors, outputs, small_config, snapshot, train_steps, tuner_layers
from tests.conftest import tiny_model
from tests.ops.compare import assert_close, gradients

NAME = "bert.encoder.layer.1.output.dense"


def hear(layer: Any, x: Tensor) -> tuple[Any, list[Tensor]]:
    """Hooks that put `x` in the place of a layer's input and keep its output."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda *args: (x,)),
        layer.register_forward_hook(lambda *args: seen.append(args[2])),
    ]
    return handles, seen


@pytest.mark.parametrize(("preset_words", "lasts"), [({}, [4, 2]), ({"per": "token"}, None)], ids=["sequence", "token"])
def test_a_layer_equals_the_reference(preset_words: dict[str, Any], lasts: list[int] | None) -> None:
    """Forward and the gradient of the input and of every tensor; the last valid token decides, or each for itself."""
    model = adapted("mixda", "bert", **preset_words)
    layer = tuner_layers(model)[NAME]
    parts = layer.parts["default"]
    names = {f"{first}.{name}": part for first, part in parts.items() for name in part.declared}
    leaves = {name: part.get_parameter(name.partition(".")[2]) for name, part in names.items()}
    leaves["x"] = torch.randn(2, 5, 52).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    def ours() -> Tensor:
        handles, seen = hear(layer, leaves["x"])
        model.get_base_model()(inputs_embeds=torch.zeros(2, 5, 36), attention_mask=mask)
        for handle in handles:
            handle.remove()
        return seen[0][mask.bool()]

    def naive() -> Tensor:
        gate = [(leaves[f"router.weight_{i}"], leaves[f"router.bias_{i}"]) for i in range(2)]
        adapters = list(zip(*(leaves[n] for n in ("down.weight", "S.down", "up.weight", "S.up")), strict=True))
        rows = []
        for b, x_SF in enumerate(leaves["x"]):
            deciding = x_SF if lasts is None else [x_SF[lasts[b]]] * 5
            gates = torch.stack([reference_adapters.mlp(x_F, gate).softmax(-1) for x_F in deciding])
            rows.append(reference_adapters.adapters_and_linear(x_SF, layer.base_layer(x_SF), adapters, gates))
        return torch.stack(rows)[mask.bool()]

    found, expected = gradients(ours, leaves), gradients(naive, leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-5)


def test_all_tokens_of_a_sequence_have_one_decision() -> None:
    model = adapted("mixda", "bert")
    with record_routing(model) as recorder:
        outputs(model, "bert")
    for record in recorder.records:
        gates_BSE = record.routing.gates_TE().view(3, 11, 3)
        assert torch.equal(gates_BSE, gates_BSE[:, :1].expand(3, 11, 3))
        assert (gates_BSE[0] - gates_BSE[1]).abs().max() > 1e-4
        torch.testing.assert_close(gates_BSE.sum(-1), torch.ones(3, 11))


def test_the_last_tokens_of_packed_and_padded_rows() -> None:
    valid = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    assert last_tokens_N(Tokens(valid)).tolist() == [3, 7]
    packed = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 3, 3]])
    assert last_tokens_N(Tokens(valid, packed)).tolist() == [1, 3, 7, 0]
    assert last_tokens_N(Tokens(valid[:0])).tolist() == []


def test_a_decoder_is_refused_but_for_tokens_that_decide_for_themselves() -> None:
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(ConfigError, match=r"per is 'sequence'.*attends to earlier tokens only.*allowed: per='token'"):
        get_peft_model(base, small_config("mixda"))
    assert snapshot(base)["modules"] == before["modules"]
    model = adapted("mixda", per="token")
    ids = torch.arange(3, 14).view(1, 11)
    changed = ids.clone()
    changed[0, -1] = 90
    one, other = (outputs(model, input_ids=each, attention_mask=None, labels=None) for each in (ids, changed))
    torch.testing.assert_close(one[0, :-1], other[0, :-1], rtol=0, atol=1e-6)
    words: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=True, **words), model.generate(ids, use_cache=False, **words))


def test_the_second_stage_trains_the_gate_alone(tmp_path: Path) -> None:
    """As the preset's docstring has it: a folder of the first stage, with a configuration that freezes its adapters."""
    first = adapted("mixda", "bert", task_type=None)
    first.save_pretrained(str(tmp_path))
    config = small_config("mixda", "bert", task_type=None, frozen_adapters=2)
    model = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path), config=config, is_trainable=True)
    torch.testing.assert_close(outputs(model.eval(), "bert"), outputs(first, "bert"), rtol=0, atol=0)
    before = adapter_tensors(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if "moelora_router" in name}
    train_steps(model, "bert")
    after = adapter_tensors(model)
    assert all(torch.equal(after[name], tensor) == (name not in trained) for name, tensor in before.items())
    with pytest.raises(ConfigError, match=r"experts\.num_frozen is 3; allowed: 0 to the number of adapters \(2\)"):
        small_config("mixda", "bert", frozen_adapters=3)


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match=r"experts\.num_experts is 1; allowed: an integer of at least 2"):
        MoeLoraConfig.from_preset("mixda", num_adapters=0)
    with pytest.raises(ConfigError, match="beside the last linear of a feed-forward block"):
        MoeLoraConfig(experts="bottleneck", selection="dense")
    with pytest.raises(ConfigError, match="per is 'batch'"):
        MoeLoraConfig.from_preset("mixda", per="batch")
