"""Linears that a forward passes by, or that are none: left out of "all-linear", refused by name if named."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WavLMConfig,
    WavLMModel,
)

from moelora import MoeLoraConfig
from moelora.errors import TargetError
from moelora.inject.base_modules import base_modules
from moelora.inject.reach import find_unreached
from tests.adapters import shake, small_config, snapshot, tuner_layers
from tests.conftest import VOCAB
from tests.inject.bases import MOE, seeded


class Attention(nn.Module):
    """Torch's own attention between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last(self.attention(x, x, x, need_weights=False)[0])
        return y


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


class Another(nn.Linear):
    """The same in other words."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def config() -> MoeLoraConfig:
    return MoeLoraConfig(experts={"kind": "lora", "r": 2, "num_experts": 3})


def test_all_linear_leaves_out_what_torch_attention_reads_itself() -> None:
    base = Attention()
    x = torch.randn(5, 3, 8)
    expected = base(x)
    model = get_peft_model(base, config())
    assert set(tuner_layers(model)) == {"first", "last"}
    torch.testing.assert_close(model(x), expected)
    shake(model)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_of_torch_transformers(batch_first: bool) -> None:
    # in evaluation its fused kernel takes the weights of linear1 and linear2
    encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, dropout=0.0)
    decoder = nn.TransformerDecoderLayer(8, 2, 12, batch_first=batch_first, dropout=0.0)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder, "out": nn.Linear(8, 8)})
    sites = set(tuner_layers(get_peft_model(model, config())))
    assert sites == {"decoder.linear1", "decoder.linear2", "out"}


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (Attention(), "out_proj", r"'attention\.out_proj' cannot be adapted: .*'attention' \(Multihead.* reads"),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12)), "linear2", r"'0\.linear2' cannot be adapted: .*reads"),
        (nn.ModuleDict({"a": Twice(3, 5)}), "a", r"'a' cannot be adapted: its class Twice .* computes something else"),
        (nn.ModuleDict({"a": Pair(3, 5)}), "a", r"its class Pair has a forward of its own: it returns a tuple"),
        (nn.ModuleDict({"a": TwoInputs(3, 5)}), "a", r"its class TwoInputs .*fails with TypeError"),
    ],
)  # fmt: skip
def test_named_they_are_refused(model: nn.Module, target: str, message: str) -> None:
    model.requires_grad_(True)
    before = snapshot(model)
    with pytest.raises(TargetError, match=message) as error:
        get_peft_model(model, MoeLoraConfig(target_modules=[target]))
    assert "Leave it out with exclude_modules" in str(error.value)
    assert snapshot(model) == before


def test_what_is_a_linear_in_other_words_stays_one() -> None:
    for bias in (True, False):
        assert not find_unreached({"a": Another(3, 5, bias=bias), "b": nn.Linear(3, 5, bias=bias)})
    assert not find_unreached({"a": Another(3, 5, device="meta", dtype=torch.bfloat16)})
    words = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": VOCAB}
    falcon = FalconForCausalLM(FalconConfig(**words))  # its linears multiply by the transposed weight
    assert not find_unreached(dict(base_modules(falcon)))
    assert len(tuner_layers(get_peft_model(falcon, small_config("sira")))) == 4


def test_looking_changes_nothing() -> None:
    linear = Twice(3, 5)
    linear.register_forward_hook(lambda *_: pytest.fail("the real module was run"))
    before, state = {key: value.clone() for key, value in linear.state_dict().items()}, torch.get_rng_state()
    assert set(find_unreached({"a": linear})) == {"a"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in linear.state_dict().items())
    assert (linear.in_features, linear.training) == (3, True)


def test_a_router_that_gives_a_tuple_is_no_linear() -> None:
    ((name, reason),) = find_unreached(dict(base_modules(seeded(MOE["llama4"])))).items()
    assert name == "model.layers.1.feed_forward.router"
    assert "Llama4Router has a forward of its own: it returns a tuple" in reason


def test_a_state_space_model_keeps_what_its_kernels_call() -> None:
    model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=VOCAB, state_size=4))
    adapted = get_peft_model(model, small_config("sira"))
    assert set(tuner_layers(adapted)) == {"backbone.layers.0.mixer.in_proj"}


class ReadsWeights(nn.Module):
    """Takes the weight of one linear, calls the second, asks the third for its dtype only and hands on the fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.asked, self.handed_on = (nn.Linear(3, 3) for _ in range(4))
        nn.init.zeros_(self.asked.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.read.weight, self.read.bias)
        x = self.called(x) + self.called.weight.sum()
        x = x.to(self.asked.weight.dtype) + self.asked.weight.shape[0]
        return nn.Sequential(self.handed_on)(x) + self.handed_on.weight.sum()


def test_a_weight_that_is_read_and_never_called() -> None:
    model = get_peft_model(ReadsWeights(), config())
    assert set(tuner_layers(model)) == {"called", "asked", "handed_on"}
    with pytest.raises(TargetError, match=r"'read' cannot be adapted: .* \(ReadsWeights\) reads its weight"):
        get_peft_model(ReadsWeights(), MoeLoraConfig(target_modules=["read"]))


def test_attention_by_a_functional() -> None:
    words = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    convolutions = {"conv_dim": [8], "conv_stride": [4], "conv_kernel": [4], "num_conv_pos_embeddings": 4}
    model = WavLMModel(WavLMConfig(**words, **convolutions, num_conv_pos_embedding_groups=2, num_feat_extract_layers=1))
    unreached = {name.rpartition(".")[-1] for name in find_unreached(dict(base_modules(model)))}
    assert unreached == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_a_vision_tower_with_a_pooling_head_of_torch_attention() -> None:
    words = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = SiglipVisionModel(SiglipVisionConfig(**words, image_size=8, patch_size=4)).eval()
    adapted = get_peft_model(model, small_config("sira", task_type=None))
    sites = tuner_layers(adapted)
    assert sites
    assert not any(name.endswith("head.attention.out_proj") for name in sites)
    shake(adapted)
    adapted(pixel_values=torch.randn(2, 3, 8, 8)).pooler_output.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
