"""MixDoRA: one expert is PEFT's DoRA, each layer is its equation, magnitudes are saved, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from moelora import MoeLoraConfig
from moelora.compose import drop_experts
from moelora.errors import ComposeError, ConfigError, ExportError
from moelora.export import to_native_moe, write_mixlora
from moelora.ops.compute import Reference
from tests.adapters import (
    adapted,
    adapted_linears,
    assert_close_gradients,
    gradients,
    outputs,
    shake,
    small_config,
    tuner_layers,
)
from tests.conftest import tiny_batch, tiny_model

# qwen2 has biases, phi a plain block with them, phi3 a fused one, gpt2 transposed weights, bert a split block
FORMS = ("llama", "qwen2", "phi", "phi3", "gpt2", "bert")
CALM: dict[str, dict[str, Any]] = {
    "gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def tensor(layer: Any, first: str, role: str) -> Tensor:
    """A tensor of the only expert on a linear."""
    found: Tensor = layer.parts["default"][first].tensor(role or "weight")
    return found


def as_peft_dora(model: Any, base: Any) -> Any:
    """PEFT's DoRA with the tensors of a model's only experts, of which one adapter is on each linear."""
    linears = adapted_linears(model)
    config = model.peft_config["default"]
    words = {"r": config.experts.r, "lora_alpha": config.experts.lora_alpha, "task_type": config.task_type}
    dora = get_peft_model(base, peft.LoraConfig(target_modules=sorted(linears), use_dora=True, **words))
    for path, (_, layer, role) in linears.items():
        other = dora.get_submodule(f"base_model.model.{path}")
        starts = tensor(layer, "M", role)
        assert other.lora_magnitude_vector["default"].weight.shape == starts[0].shape
        other.lora_A["default"].weight.data = tensor(layer, "A", role)[0].detach().clone()
        other.lora_B["default"].weight.data = tensor(layer, "B", role)[0].detach().clone()
        other.lora_magnitude_vector["default"].weight.data = starts[0].detach().clone()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            dora.get_parameter(name).data = parameter.detach().clone()
    return dora


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", FORMS)
def test_one_expert_is_pefts_dora(name: str, mode: str) -> None:
    """Logits and the gradients of A, B and the magnitudes, with top-1 on whole blocks and alone on other linears."""
    words = CALM.get(name, {})
    model = get_peft_model(tiny_model(name, **words), small_config("mixdora", name, num_experts=1, top_k=1))
    shake(model, seed=1)
    dora = as_peft_dora(model, tiny_model(name, **words))
    for each in (model, dora):
        each.train(mode == "train").zero_grad()
        each(**tiny_batch(name)).loss.backward()
    torch.testing.assert_close(outputs(model, name), outputs(dora, name), rtol=1e-4, atol=1e-5)
    linears = adapted_linears(model)
    assert len(linears) >= 8
    for path, (_, layer, role) in linears.items():
        other = dora.get_submodule(f"base_model.model.{path}")
        for first, theirs in (("A", other.lora_A), ("B", other.lora_B), ("M", other.lora_magnitude_vector)):
            found, expected = tensor(layer, first, role).grad, theirs["default"].weight.grad
            assert found is not None
            atol = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=atol, msg=f"{path} {first}: {{}}".format)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_magnitudes_start_at_pefts(name: str) -> None:
    model = get_peft_model(tiny_model(name), small_config("mixdora", name, num_experts=3))
    linears = adapted_linears(model)
    dora = get_peft_model(tiny_model(name), peft.LoraConfig(target_modules=sorted(linears), use_dora=True))
    for path, (_, layer, role) in linears.items():
        magnitudes = tensor(layer, "M", role)
        assert magnitudes.shape[0] == (3 if role else 1)
        theirs = dora.get_submodule(f"base_model.model.{path}").lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitudes, theirs.expand_as(magnitudes), rtol=1e-6, atol=0)


def test_dropout_is_pefts_with_the_same_draw() -> None:
    """On single linears, where both draw alike: W, too, sees what dropout leaves."""
    words: dict[str, Any] = {"placement": {"kind": "linear", "unrouted_modules": ".*"}, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model(), MoeLoraConfig(experts={"kind": "dora", "r": 3, "lora_alpha": 5}, **words))
    shake(model)
    dora = as_peft_dora(model, tiny_model())
    found = []
    for each, dropouts in ((model, "moelora_dropout"), (dora, "lora_dropout")):
        each.train()
        for layer in tuner_layers(each).values():
            getattr(layer, dropouts)["default"] = nn.Dropout(0.5)
        torch.manual_seed(3)
        found.append(outputs(each))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert (found[0] - outputs(model.eval())).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "phi", "phi3"])
@pytest.mark.parametrize("placement", ["feed_forward", "linear"])
def test_a_model_equals_the_references(name: str, placement: str) -> None:
    experts = {"kind": "dora", "r": 3, "num_experts": 4}
    words: dict[str, Any] = {"experts": experts, "placement": placement, "task_type": "CAUSAL_LM"}
    found = []
    for compute in ("fast", "reference"):
        model = get_peft_model(tiny_model(name), MoeLoraConfig(**words, compute=compute)).eval()
        shake(model)
        batch = tiny_batch(name, batch_size=2, length=4)  # the reference makes a weight for each token
        found.append((outputs(model, name, **batch), gradients(model, batch)))
    assert isinstance(model.peft_config["default"].compute, Reference)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert_close_gradients(found[0][1], found[1][1])


def test_a_saved_adapter_keeps_its_magnitudes(tmp_path: Path) -> None:
    """The authors' code loses them."""
    model = adapted("mixdora")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    assert torch.equal(outputs(loaded), outputs(model))
    name = "base_model.model.model.layers.0.mlp.moelora_M.default.down"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    fresh = get_peft_model(tiny_model(), small_config("mixdora"))
    assert not torch.equal(fresh.get_parameter(name), model.get_parameter(name))


def test_magnitudes_stay_fp32_in_a_half_precision_model() -> None:
    model = get_peft_model(tiny_model().bfloat16(), small_config("mixdora"), autocast_adapter_dtype=False)
    model = model.bfloat16()
    dtypes = {name: p.dtype for name, p in model.named_parameters() if ".moelora_" in name}
    assert {dtype for name, dtype in dtypes.items() if ".moelora_M." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".moelora_B." in name} == {torch.bfloat16}
    assert torch.equal(outputs(model), outputs(tiny_model().bfloat16()))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """A tiny Llama in nf4."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("base")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    sizes["num_key_value_heads"] = 2
    tiny_model(**sizes).save_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32).eval()


def test_one_expert_is_pefts_dora_on_nf4(quantised: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    """In training mode: outside of it the CPU's kernels repack weights, which PEFT cannot dequantise then."""
    caplog.set_level(logging.ERROR)
    model = get_peft_model(quantised(), small_config("mixdora", num_experts=1, top_k=1))
    dora = as_peft_dora(model, quantised())
    theirs = dora.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    fresh = peft.get_peft_model(quantised(), peft.LoraConfig(target_modules=["up_proj"], use_dora=True))
    start = fresh.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_magnitude_vector["default"].weight
    found = tuner_layers(model)["model.layers.0.mlp"].parts["default"]["M"].tensor("up")
    torch.testing.assert_close(found[0], start, rtol=1e-5, atol=0)
    shake(model)
    dora = as_peft_dora(model, quantised())
    batch = tiny_batch()
    losses = []
    for each in (model.train(), dora.train()):
        loss = each(**batch).loss
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[1])
    theirs = dora.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_magnitude_vector["default"].weight
    torch.testing.assert_close(found.grad[0], theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match="compute is 'compiled'; allowed: 'fast' or 'reference' with 'dora'.*own way"):
        MoeLoraConfig.from_preset("mixdora", compute="compiled")
    with pytest.raises(ConfigError, match="placement is 'moe_block.*has no weight, whose norms they need"):
        MoeLoraConfig(experts="dora", placement="moe_block")
    model = get_peft_model(tiny_model(), small_config("mixdora", lora_dropout=0.1, compute="reference")).train()
    with pytest.raises(ConfigError, match="compute is 'reference'; allowed: 'fast' in training with dropout"):
        model(**tiny_batch())


def test_what_holds_loras_only_refuses_it(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = adapted("mixdora")
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ComposeError, match="has 'dora' experts; allowed: experts that are LoRAs"):
        drop_experts(tmp_path / "adapter", tmp_path / "out", [0])
    for export in (to_native_moe, write_mixlora):
        with pytest.raises(ExportError, match="experts (are of kind|is) 'dora'.*llowed: 'lora'"):
            export(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
