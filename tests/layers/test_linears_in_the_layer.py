"""Feed-forward mixtures on linears that stand in the layer itself, beside its attention, as in OPT and BART."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from moelora import MoeLoraConfig
from moelora.errors import TargetError
from moelora.layers.linear import MixtureLinear
from moelora.layers.split_feed_forward import MixtureSplitFeedForward, PassThrough
from tests.adapters import shake, small_config, snapshot, tuner_layers
from tests.conftest import VOCAB

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
_PAIR = {
    "d_model": 36,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 52,
    **_HEADS,
}
_SOUND = {"num_mel_bins": 5, "max_source_positions": 8, "max_target_positions": 8}
_ALBERT = {"hidden_size": 36, "embedding_size": 8, "num_attention_heads": 6, "intermediate_size": 52}
# Model, fields of its configuration, and the number of its blocks: all layers of an ALBERT are one.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "bart": ("Bart", {**_TOKENS, **_PAIR}, 2),
    "whisper": ("Whisper", {**_TOKENS, **_PAIR, **_SOUND}, 2),
    "albert": ("Albert", {**_TOKENS, **_ALBERT, "num_hidden_layers": 2}, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    kind, words, count = MODELS[name]
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**words)).eval()
    ids = torch.arange(3, 13).view(2, 5)
    batch = {"input_ids": ids}
    if name == "whisper":
        batch = {"input_features": torch.ones(2, 5, 16), "decoder_input_ids": ids}
    with torch.no_grad():
        expected = base(**batch).last_hidden_state
        model = get_peft_model(base, small_config("mixlora", task_type=None))
        layers = [layer for layer in tuner_layers(model).values() if isinstance(layer, MixtureSplitFeedForward)]
        assert len(layers) == count
        torch.testing.assert_close(model(**batch).last_hidden_state, expected, rtol=1e-5, atol=2e-6)
        shake(model)
        assert (model(**batch).last_hidden_state - expected).abs().max() > 1e-3


def config() -> MoeLoraConfig:
    return MoeLoraConfig(placement="feed_forward")


class InLayer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.dropout = nn.Sequential(nn.Linear(6, 6)), dropout
        self.up, self.act, self.down = nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.act(self.up(x + self.attention(x)))
        y: Tensor = x + self.down(F.dropout(hidden, self.dropout, self.training))
        return y


class AttentionOfThree(InLayer):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y, _, _ = self.attention(x), None, None
        return super().forward(y, mask)


class Skips(InLayer):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.act(self.up(x))
        y: Tensor = self.down(hidden) + hidden.mean()
        return y


class NoActivation(InLayer):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.down(self.up(x)) + self.act(x)
        return y


class ChangesLater(InLayer):
    """What it does depends on more than a plan can see."""

    factor = 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.act(self.up(x))
        y: Tensor = self.down(hidden if self.factor == 1.0 else hidden * self.factor)
        return y


@pytest.mark.parametrize("layer", [InLayer, AttentionOfThree])
def test_linears_that_stand_in_the_layer(layer: type[InLayer]) -> None:
    base = nn.ModuleDict({"layer": layer()})
    x = torch.randn(2, 3, 6)
    expected = base["layer"](x, None)
    model = get_peft_model(base, config())
    sites, own = tuner_layers(model), base["layer"]
    assert {name: type(site) for name, site in sites.items()} == {
        "layer.attention.0": MixtureLinear,
        "layer.up": MixtureSplitFeedForward,
    }
    assert [type(part) for part in (own.act, own.down)] == [PassThrough, PassThrough]
    torch.testing.assert_close(own(x, None), expected)
    shake(model)
    changed = own(x, None)
    assert (changed - expected).abs().max() > 1e-3
    torch.testing.assert_close(torch.compile(own, backend="eager")(x, None), changed)
    with model.disable_adapter():
        assert torch.equal(own(x, None), expected)
    own(x, None).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    other = small_config("sira", task_type=None, target_modules=["up"])
    with pytest.raises(TargetError, match="allowed: adapters that treat a feed-forward block alike"):
        model.add_adapter("second", other)
    model.unload()
    assert torch.equal(base["layer"](x, None), expected)
    one = get_peft_model(base, other)
    with pytest.raises(TargetError, match="allowed: adapters that treat a feed-forward block alike"):
        one.add_adapter("second", config())


@pytest.mark.parametrize("layer", [Skips(), NoActivation(), InLayer(dropout=0.1)])
def test_layers_that_use_them_otherwise_are_refused_by_name(layer: nn.Module) -> None:
    base = nn.ModuleDict({"layer": layer})
    before = snapshot(base)
    message = rf"'layer' \({type(layer).__name__}\) has the linears 'up' and 'down' and the activation 'act'"
    with pytest.raises(TargetError, match=rf"{message} .*its forward does not give"):
        get_peft_model(base, config())
    assert snapshot(base) == before


def test_what_happens_later_between_them_is_refused_at_the_forward() -> None:
    layer = ChangesLater()
    base = nn.ModuleDict({"layer": layer})
    model = get_peft_model(base, config())
    layer.factor = 0.5
    with pytest.raises(TargetError, match=r"'layer\.up' was read as the first half .* changes its output"):
        layer(torch.randn(2, 3, 6))
    with model.disable_adapter():
        layer(torch.randn(2, 3, 6))
