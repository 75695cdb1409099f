"""Adapters on linears of other quantisation libraries than bitsandbytes, where these run on a CPU.

They are no dependencies of moelora, not even for its tests. To run these: `pip install torchao hqq termcolor`, and with
`--no-deps` gptqmodel, device-smi, pypcre, tokenicer, logbar, defuser, random_word and optimum; then `pytest -W ignore`,
since the import of hqq warns of something that torch deprecates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from moelora.layers.modules import is_linear
from tests.adapters import adapter_tensors, assert_equal_tensors, outputs, shake, small_config, tuner_layers
from tests.conftest import tiny_batch, tiny_model


def with_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def with_hqq(model: nn.Module) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            words = {"compute_dtype": torch.float32, "device": "cpu"}
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantize.HQQLinear(module, config, **words))


def with_gptqmodel(model: nn.Module, kind: str) -> None:
    """Rounded to 4 bits in groups of 32, without a search for better roundings: what the layers compute is the same."""
    module = pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{kind}")
    layer_class = {"torch": "TorchLinear", "torch_awq": "AwqTorchLinear"}[kind]
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        groups = linear.weight.detach().unflatten(1, (-1, 32))
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round()
        words = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "bias": False, "register_buffers": True}
        layer = getattr(module, layer_class)(in_features=linear.in_features, out_features=linear.out_features, **words)
        pack = getattr(layer, "pack_original", layer.pack)  # GPTQ's other way compiles C++
        pack(linear, scales, zeros, torch.arange(linear.in_features, dtype=torch.int32) // 32)
        layer.optimized = True  # and it compiles its forward otherwise
        layer.post_init()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


BACKENDS: dict[str, Callable[[nn.Module], None]] = {
    "torchao": with_torchao,
    "hqq": with_hqq,
    "gptq": partial(with_gptqmodel, kind="torch"),
    "awq": partial(with_gptqmodel, kind="torch_awq"),
}
# torchao int8 weights of round sizes; groups of 32 want them too
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def quantised(backend: str) -> Any:
    model = tiny_model(**SIZES, num_hidden_layers=1)
    BACKENDS[backend](model)
    return model.eval()


@pytest.mark.parametrize("preset", ["mixlora", "sira", "mixdora"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer(backend: str, preset: str, tmp_path: Path) -> None:
    base = quantised(backend)
    expected = outputs(base)
    assert (expected - outputs(tiny_model(**SIZES, num_hidden_layers=1))).abs().max() > 1e-5  # it is quantised
    model = get_peft_model(base, small_config(preset))
    layers = tuner_layers(model)
    assert layers.keys() == tuner_layers(get_peft_model(tiny_model(num_hidden_layers=1), small_config(preset))).keys()
    for layer in layers.values():
        for role in layer.linear_sizes():
            linear = layer.linear(role) if role else layer.get_base_layer()
            assert is_linear(linear)
            assert type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter
    torch.testing.assert_close(outputs(model), expected, atol=1e-4, rtol=1e-4)
    shake(model)
    changed = outputs(model)
    assert (changed - expected).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(outputs(model), expected)
    model.train()(**tiny_batch()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    model.eval().save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(quantised(backend), str(tmp_path))
    assert_equal_tensors(adapter_tensors(loaded), adapter_tensors(model))
    torch.testing.assert_close(outputs(loaded), changed, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(model.unload()), expected)
