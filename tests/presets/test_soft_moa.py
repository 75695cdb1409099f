"""Soft-MoA: a layer is its equation, and a causal model is refused, since it would see later tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from moelora import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.experts.slots import SlotExperts
from tests.adapters import adapted, outputs, shake, small_config, snapshot, tuner_layers
from tests.conftest import tiny_model
from tests.ops.compare import assert_close, gradients


class Alone(nn.Module):
    """A BERT layer's feed-forward part up to `down`, called as a model with a mask."""

    def __init__(self, model: Any, layer: Any) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handles = [
            self.layer.register_forward_pre_hook(lambda *args: (x,)),
            self.layer.register_forward_hook(lambda *args: seen.append(args[2])),
        ]
        self.model.get_base_model()(inputs_embeds=torch.zeros(*mask.shape, 36), attention_mask=mask)
        for handle in handles:
            handle.remove()
        return seen[0]


def naive(layer: Any, x: Tensor, lengths: list[int], leaves: dict[str, Tensor]) -> Tensor:
    """One sequence, one slot, one token after the other."""
    rows = []
    for x_SD, length in zip(x, lengths, strict=True):
        z_SE = x_SD @ leaves["phi"].t()
        dispatch = z_SE[:length].softmax(0)
        combine = z_SE.softmax(1)
        made = []
        for e in range(6):
            slot = sum(dispatch[s, e] * x_SD[s] for s in range(length))
            n = e // 2
            inner = torch.nn.functional.gelu(leaves["down"][n] @ slot + leaves["S.down"][n])
            made.append(leaves["up"][n] @ inner + leaves["S.up"][n])
        added = [sum(combine[s, e] * made[e] for e in range(6)) for s in range(len(x_SD))]
        rows.append(layer.linear("down")(layer.base_layer(x_SD)) + torch.stack(added))
    return torch.stack(rows)


def test_a_layer_equals_the_reference() -> None:
    """Forward and the gradient of the input and of every tensor; padding does not enter a slot."""
    model = adapted("soft_moa", "bert")
    layer = tuner_layers(model)["bert.encoder.layer.1.intermediate"]
    leaves = {
        "x": torch.randn(2, 5, 36).requires_grad_(),
        "phi": layer.moelora_router["default"].weight,
        "down": layer.moelora_down["default"].weight,
        "up": layer.moelora_up["default"].weight,
        "S.down": layer.moelora_S["default"].down,
        "S.up": layer.moelora_S["default"].up,
    }
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ours = Alone(model, layer)
    valid = mask.bool()
    found = gradients(lambda: ours(leaves["x"], mask)[valid], leaves)
    expected = gradients(lambda: naive(layer, leaves["x"], [5, 3], leaves)[valid], leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma2", "t5"])
def test_a_causal_model_is_refused_and_left_as_it_was(name: str) -> None:
    base = tiny_model(name)
    before = snapshot(base)
    with pytest.raises(
        ConfigError, match=r"attends to earlier tokens only.*a token would see those that come after it"
    ):
        get_peft_model(base, small_config("soft_moa", "bert", task_type=None))
    assert snapshot(base)["modules"] == before["modules"]
    with pytest.raises(ConfigError, match="task_type is 'CAUSAL_LM'"):
        MoeLoraConfig.from_preset("soft_moa", task_type="CAUSAL_LM")


def test_the_encoder_of_an_encoder_decoder_is_not() -> None:
    config = MoeLoraConfig.from_preset("soft_moa", exclude_modules=r"decoder\..*", task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(tiny_model("t5"), config)
    assert [path.split(".")[0] for path in tuner_layers(model)] == ["encoder", "encoder"]


def test_the_leak_that_the_refusal_prevents(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Llama a later token would change what comes before it; the base and MixLoRA have no such leak."""
    monkeypatch.setattr(SlotExperts, "check_site", lambda self, site: None)
    leaking = get_peft_model(tiny_model(), small_config("soft_moa", "bert", task_type=None)).eval()
    shake(leaking)
    ids = torch.arange(3, 14).view(1, 11)
    changed = ids.clone()
    changed[0, -1] = 90
    for model, leaks in ((leaking, True), (adapted("mixlora"), False), (tiny_model(), False)):
        one, other = (outputs(model, input_ids=each, attention_mask=None, labels=None) for each in (ids, changed))
        difference = (one - other)[0, :-1].abs().max()
        assert difference > 1e-3 if leaks else difference < 1e-6


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match=r"experts\.num_experts is 5; allowed: a multiple"):
        MoeLoraConfig(experts={"kind": "slots", "num_experts": 5, "slots": 2})
    with pytest.raises(ConfigError, match="They stand beside a whole block"):
        MoeLoraConfig(experts="slots", selection="dense")
    with pytest.raises(ConfigError, match="Every token reads every slot"):
        MoeLoraConfig(experts="slots", placement="block", selection="top_k")
