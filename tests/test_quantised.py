"""Adapters on bitsandbytes 4-bit and 8-bit linears, on the CPU."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from moelora import MoeLoraTrainer, record_routing
from moelora.inject.blocks import find_form
from moelora.layers.feed_forward import MixtureFeedForward
from moelora.ops.compute import Reference
from tests.adapters import adapter_tensors, assert_equal_tensors, outputs, shake, small_config, tuner_layers
from tests.conftest import tiny_batch, tiny_model
from tests.training.runs import toy_rows, train

bitsandbytes = pytest.importorskip("bitsandbytes")

SCHEMES: dict[str, BitsAndBytesConfig] = {
    "nf4-fp32": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "nf4-bf16": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
# Without gradients the 4-bit kernels take another path, with other rounding.
TOLERANCE: dict[str, Any] = {"atol": 1e-2, "rtol": 1e-2}

Load = Callable[..., Any]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # int8 logs a line for each product


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load a tiny model quantised; blocks of 64 weights want round sizes."""
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    saved: dict[str, Path] = {}

    def quantised(scheme: str, name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
        if name not in saved:
            saved[name] = folder / name
            tiny_model(name, **sizes).save_pretrained(saved[name])
        return AutoModelForCausalLM.from_pretrained(
            saved[name], quantization_config=SCHEMES[scheme], dtype=dtype
        ).eval()

    return quantised


@pytest.mark.parametrize("preset", ["mixlora", "smora", "sira"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sites_count_and_b_zero(scheme: str, preset: str, load: Load) -> None:
    base = load(scheme)
    expected = outputs(base)
    config = small_config(preset)
    count = config.num_trainable_parameters(base)
    model = get_peft_model(base, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert set(tuner_layers(model)) == set(tuner_layers(get_peft_model(tiny_model(), small_config(preset))))
    kind = bitsandbytes.nn.Linear8bitLt if scheme == "int8" else bitsandbytes.nn.Linear4bit
    for layer in tuner_layers(model).values():
        blocks = isinstance(layer, MixtureFeedForward)
        assert all(isinstance(layer.linear(role), kind) for role in layer.linear_sizes()) if blocks else True
        assert blocks or isinstance(layer.base_layer, kind)
    torch.testing.assert_close(outputs(model), expected, **TOLERANCE)
    shake(model)
    assert (outputs(model) - expected).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("name", ["llama", "phi", "phi3"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forms_of_quantised_blocks(scheme: str, name: str, load: Load) -> None:
    block = load(scheme, name).model.layers[0].mlp
    assert find_form(block, "mlp") == find_form(tiny_model(name).model.layers[0].mlp, "mlp")


def learn(model: Any, steps: int = 8) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**tiny_batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("preset", ["mixlora", "smora"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_saving_and_loading(scheme: str, preset: str, load: Load, tmp_path: Path) -> None:
    model = get_peft_model(load(scheme), small_config(preset))
    losses = learn(model)
    assert losses[-1] < losses[0] - 0.3
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load(scheme), str(tmp_path))
    assert_equal_tensors(adapter_tensors(loaded), adapter_tensors(model))
    torch.testing.assert_close(outputs(loaded), outputs(model), **TOLERANCE)


@pytest.mark.parametrize(("scheme", "preset"), [("nf4-fp32", "smora"), ("nf4-bf16", "mixlora"), ("int8", "mixlora")])
def test_a_stopped_training_goes_on_bit_for_bit(scheme: str, preset: str, load: Load, tmp_path: Path) -> None:
    words: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    straight = train(get_peft_model(load(scheme), small_config(preset)), toy_rows(), output_dir=str(tmp_path), **words)
    model = get_peft_model(load(scheme), small_config(preset))
    shake(model, seed=7)
    resumed = MoeLoraTrainer(model=model, args=straight.trainer.args, train_dataset=toy_rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.log_history[2]["loss"] == straight.logs[2]["loss"]
    assert_equal_tensors(adapter_tensors(model), adapter_tensors(straight.trainer.model))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # peft's own
@pytest.mark.parametrize("preset", ["mixlora", "smora"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_prepared_for_kbit_training_with_checkpointing(scheme: str, preset: str, load: Load) -> None:
    base = prepare_model_for_kbit_training(
        load(scheme), use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(base, small_config(preset))
    losses = learn(model)
    assert losses[-1] < losses[0] - 0.3
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "router" in name and p.requires_grad)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_router_computes_in_fp32(scheme: str, load: Load) -> None:
    model = get_peft_model(load(scheme, dtype=torch.bfloat16), small_config("mixlora"))
    shake(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as TRL does on quantised bases, the router included
            parameter.data = parameter.data.to(torch.bfloat16)
    assert learn(model, steps=2)  # before any evaluation, which repacks 4-bit weights on CPUs with AVX512-BF16 for good
    with record_routing(model) as listener:
        outputs(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs(model)
        assert len(listener.records) == 4
        for record in listener.records:
            assert record.routing.logits_TE.dtype == torch.float32
            assert record.routing.weights_TK.dtype == torch.float32


@pytest.mark.parametrize("preset", ["mixlora", "smora"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_generation(scheme: str, preset: str, load: Load) -> None:
    model = get_peft_model(load(scheme), small_config(preset)).eval()
    shake(model)
    ids = tiny_batch(batch_size=2, length=5)["input_ids"].clamp_min(3)
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 9)


@pytest.mark.parametrize(
    "scheme", ["nf4-fp32", "nf4-bf16"]
)  # int8 rounds activations too, which a reference cannot know
def test_reference_implementation_on_quantised_linears(scheme: str, load: Load) -> None:
    model = get_peft_model(load(scheme), small_config("mixlora", lora_alpha=1))
    shake(model)
    fast = outputs(model)
    model.peft_config["default"].compute = Reference()
    torch.testing.assert_close(outputs(model), fast, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # PEFT calls it by its old name
def test_the_page_on_quantised_bases(load: Load, tmp_path: Path) -> None:
    """docs/distributed.md's block, on a tiny model."""
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    base = load("nf4-bf16")
    tiny = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", base.config._name_or_path)
    assert tiny != code
    names: dict[str, Any] = {}
    exec(compile(tiny, "distributed.md", "exec"), names)
    layers = [module for module in names["model"].modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert torch.isfinite(names["model"](**tiny_batch()).logits).all()
