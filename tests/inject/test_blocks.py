"""Reading the structure of feed-forward blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from moelora.errors import TargetError
from moelora.inject.blocks import find_form, looks_like_feed_forward
from moelora.layers.modules import FeedForwardForm, is_linear
from tests.conftest import tiny_model

D, F_ = 12, 20

BLOCKS: dict[str, tuple[str, dict[str, Any], FeedForwardForm]] = {
    "llama": ("model.layers.1.mlp", {}, FeedForwardForm("gated", "up_proj", "down_proj", "act_fn", "gate_proj")),
    "qwen2": ("model.layers.1.mlp", {}, FeedForwardForm("gated", "up_proj", "down_proj", "act_fn", "gate_proj")),
    "qwen3": ("model.layers.1.mlp", {}, FeedForwardForm("gated", "up_proj", "down_proj", "act_fn", "gate_proj")),
    "gemma2": ("model.layers.1.mlp", {}, FeedForwardForm("gated", "up_proj", "down_proj", "act_fn", "gate_proj")),
    "gemma3_text": ("model.layers.1.mlp", {}, FeedForwardForm("gated", "up_proj", "down_proj", "act_fn", "gate_proj")),
    "mistral": ("model.layers.1.mlp", {}, FeedForwardForm("gated", "up_proj", "down_proj", "act_fn", "gate_proj")),
    "phi": ("model.layers.1.mlp", {}, FeedForwardForm("plain", "fc1", "fc2", "activation_fn")),
    "phi3": ("model.layers.1.mlp", {}, FeedForwardForm("fused", "gate_up_proj", "down_proj", "activation_fn")),
    "gpt2": (
        "transformer.h.1.mlp",
        {},
        FeedForwardForm("plain", "c_fc", "c_proj", "act", output_dropout="dropout"),
    ),
    "t5": (
        "decoder.block.1.layer.2.DenseReluDense",
        {},
        FeedForwardForm("plain", "wi", "wo", "act", hidden_dropout="dropout"),
    ),
    "t5 gated": (
        "encoder.block.1.layer.1.DenseReluDense",
        {"feed_forward_proj": "gated-gelu"},
        FeedForwardForm("gated", "wi_1", "wo", "act", "wi_0", hidden_dropout="dropout"),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_forms_of_the_architectures(name: str) -> None:
    path, overrides, form = BLOCKS[name]
    model = tiny_model(name.partition(" ")[0], **overrides)
    block = model.get_submodule(path)
    before = copy.deepcopy(block.state_dict())
    state = torch.get_rng_state()
    assert looks_like_feed_forward(block)
    assert find_form(block, path) == form
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert [name for name, module in model.named_modules() if looks_like_feed_forward(module)] == [
        name for name, module in model.named_modules() if type(module) is type(block)
    ]


class Gated(nn.Module):
    """A gated block; subclasses compute something else with the same parts."""

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, F_, bias=False), nn.Linear(D, F_, bias=False)
        self.w2 = nn.Linear(F_, D, bias=False)
        self.act = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Clamped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x).clamp(-0.5, 0.5))


class ClampedFarOut(Gated):
    # the limit of gpt-oss: nothing of it shows on inputs of ordinary size
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x).clamp(-7, 7))


class ThreeWayProduct(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x) * x.mean(-1, keepdim=True))


class Residual(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Shifted(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * (self.w3(x) + 1))


class MixedOverTokens(Gated):
    # mixes the tokens of a sequence: no function of one token
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(-2))


class ActivationBehindTheProduct(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x) * self.w3(x)))


class CalledTwice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w1(x) * self.w3(x))


class NeedsMore(Gated):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return residual + super().forward(x)


class Tupled(Gated):
    # gives a tuple, as blocks of mixture models do
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class OwnParameter(Gated):
    # a parameter that the form does not know, still neutral
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.scale * self.act(self.w1(x)) * self.w3(x))


class LargePart(Gated):
    # a decoder layer that has its feed-forward linears as direct children, as in OPT
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(D, D))


@pytest.mark.parametrize(
    "block",
    [
        Clamped,
        ClampedFarOut,
        ThreeWayProduct,
        Residual,
        Shifted,
        MixedOverTokens,
        ActivationBehindTheProduct,
        CalledTwice,
        NeedsMore,
        Tupled,
        OwnParameter,
        LargePart,
    ],
)
def test_odd_blocks_are_refused_by_name(block: type[Gated]) -> None:
    module = block()
    assert looks_like_feed_forward(module)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(
        TargetError, match=rf"'layers\.0\.mlp' \({block.__name__}\) fits none of the known forms"
    ) as error:
        find_form(module, "layers.0.mlp")
    assert "Leave its linears out with exclude_modules" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not module._forward_hooks


@pytest.mark.parametrize(
    "activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "sigmoid", "tanh", "mish"]
)
def test_activations(activation: str) -> None:
    assert find_form(Gated(activation), "mlp") == FeedForwardForm("gated", "w3", "w2", "act", "w1")


class Plain(nn.Module):
    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.drop, self.act, self.down, self.up = nn.Dropout(0.5), nn.GELU(), down, up

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))


def test_order_of_the_children_does_not_matter() -> None:
    form = find_form(Plain(nn.Linear(D, F_), nn.Linear(F_, D)), "mlp")
    assert form == FeedForwardForm("plain", "up", "down", "act", hidden_dropout="drop")
    assert find_form(Plain(Conv1D(F_, D), Conv1D(D, F_)), "mlp") == form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dtype_and_device_of_the_weights_do_not_matter(dtype: torch.dtype, device: str) -> None:
    block = Gated().to(device=device, dtype=dtype).train()
    assert find_form(block, "mlp").kind == "gated"
    assert block.training


def test_a_default_dtype_does_not_matter() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert find_form(Gated(), "mlp").kind == "gated"
    finally:
        torch.set_default_dtype(torch.float32)


def test_hooks_and_replaced_forwards_are_left_alone() -> None:
    block = Gated()
    called = []
    block.register_forward_hook(lambda *_: called.append(1))
    block.w1.register_forward_pre_hook(lambda *_: called.append(2))
    assert find_form(block, "mlp").kind == "gated"
    assert not called
    assert len(block._forward_hooks) == 1


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), True),
        (Conv1D(2, 2), True),
        (nn.Embedding(2, 2), False),
        (nn.Conv1d(2, 2, 1), False),
        (nn.LayerNorm(2), False),
        (nn.Bilinear(2, 2, 2), False),
    ],
)
def test_is_linear(module: nn.Module, expected: bool) -> None:
    assert is_linear(module) is expected


class NoActivationModule(Gated):
    def __init__(self) -> None:
        super().__init__()
        del self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def test_an_activation_that_is_no_module_is_not_seen() -> None:
    assert not looks_like_feed_forward(NoActivationModule())
