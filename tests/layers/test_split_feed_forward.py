"""Feed-forward mixtures on blocks that are split over two modules, as in BERT."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from moelora import MoeLoraConfig, record_routing
from moelora.errors import TargetError
from moelora.inject.base_modules import base_modules
from moelora.inject.split_blocks import find_split_blocks
from moelora.layers.split_feed_forward import MixtureSplitFeedForward, PassThrough
from tests.adapters import (
    adapted,
    adapter_tensors,
    assert_equal_tensors,
    outputs,
    shake,
    small_config,
    snapshot,
    stacks,
    tuner_layers,
)
from tests.conftest import tiny_batch, tiny_model

PATH = "bert.encoder.layer.{}.intermediate"


def pass_throughs(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PassThrough)]


def test_what_is_put_where() -> None:
    model = adapted("mixlora", "bert")
    layers = tuner_layers(model)
    for index in range(2):
        layer = layers[PATH.format(index)]
        assert isinstance(layer, MixtureSplitFeedForward)
        assert layer.linear_sizes() == {"up": (36, 52), "down": (52, 36)}
    assert pass_throughs(model) == [f"base_model.model.bert.encoder.layer.{i}.output.dense" for i in range(2)]
    # the pooler has a linear and an activation as well, but nothing behind it
    assert not layers["bert.pooler.dense"].moelora_router
    keys = set(get_peft_model_state_dict(model))
    assert {key.rpartition("moelora_")[-1] for key in keys if PATH.format(0) in key} == {
        "A.up",
        "B.up",
        "A.down",
        "B.down",
        "router.weight",
    }
    assert not any(".output.dense" in key and "attention" not in key for key in keys)


def test_equals_the_equations() -> None:
    """`y = sum_k w_k (W2 act(W1 h + s B1 A1 h) + b2 + s B2 A2 a_k)`, then the block's own norm with the residual."""
    model = adapted("mixlora", "bert")
    layer = tuner_layers(model)[PATH.format(1)]
    block = model.get_submodule("base_model.model.bert.encoder.layer.1")
    h = torch.randn(2, 5, 36)
    with torch.no_grad():
        actual = block.output(block.intermediate(h), h)
        first, second = layer.base_layer.dense, block.output.dense.base_layer
        (a1, b1), (a2, b2) = stacks(layer, "up"), stacks(layer, "down")
        weights = (h @ layer.moelora_router["default"].weight.T).softmax(-1)
        top, ids = weights.topk(2)
        top = top / top.sum(-1, keepdim=True)
        y = torch.zeros_like(h)
        for b in range(2):
            for t in range(5):
                for k in range(2):
                    e = ids[b, t, k]
                    inner = F.gelu(first(h[b, t]) + layer.scaling["default"] * (b1[e] @ (a1[e] @ h[b, t])))
                    y[b, t] += top[b, t, k] * (second(inner) + layer.scaling["default"] * (b2[e] @ (a2[e] @ inner)))
        expected = block.output.LayerNorm(y + h)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("roles", [["intermediate.dense"], ["layer.0.output.dense", "layer.1.output.dense"]])
def test_half_of_a_block_may_be_targeted(roles: list[str]) -> None:
    config = small_config("mixlora", "bert", target_modules=roles)
    base = tiny_model("bert")
    count, before = config.num_trainable_parameters(base), outputs(base, "bert")
    model = get_peft_model(base, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    torch.testing.assert_close(outputs(model, "bert"), before, atol=2e-6, rtol=1e-5)
    shake(model)
    assert not torch.allclose(outputs(model, "bert"), before, atol=1e-3)


@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load(low_memory: bool, tmp_path: Path) -> None:
    model = adapted("mixlora", "bert")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path), low_cpu_mem_usage=low_memory)
    assert_equal_tensors(adapter_tensors(loaded), adapter_tensors(model))
    assert torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))
    plain = tiny_model("bert")
    plain.load_adapter(str(tmp_path))
    plain.classifier.modules_to_save["default"].load_state_dict(
        model.base_model.model.classifier.modules_to_save["default"].state_dict()
    )
    assert torch.equal(outputs(plain, "bert"), outputs(model, "bert"))


def test_disable_delete_and_unload() -> None:
    base = tiny_model("bert")
    before, expected = snapshot(base), outputs(base, "bert")
    model = get_peft_model(base, small_config("mixlora", "bert", task_type=None))
    shake(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model, "bert"), expected)
    model.delete_adapter("default")
    assert torch.equal(outputs(model.base_model.model, "bert"), expected)
    model.add_adapter("again", small_config("mixlora", "bert", task_type=None))
    shake(model)
    model.set_adapter("again")
    assert not torch.equal(outputs(model, "bert"), expected)
    assert model.unload() is base
    assert torch.equal(outputs(base, "bert"), expected)
    after = snapshot(base)
    for view in (before, after):
        view["parameters"] = {key: (value[0], value[2]) for key, value in view["parameters"].items()}
    assert after == before


def two_on_bert() -> Any:
    model = adapted("mixlora", "bert", adapter_name="first")
    words = {"num_experts": 5, "r": 2, "target_modules": ["intermediate.dense", "query"], "layers_to_transform": [1]}
    model.add_adapter("second", small_config("mixlora", "bert", **words))
    shake(model, seed=3)
    return model.eval()


def test_an_adapter_for_each_sample() -> None:
    model = two_on_bert()
    assert len(pass_throughs(model)) == 2
    names = ["second", "__base__", "first"]
    together = outputs(model, "bert", adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = outputs(model, "bert")
        else:
            model.set_adapter(name)
            expected = outputs(model, "bert")
        torch.testing.assert_close(together[row], expected[row], atol=2e-6, rtol=1e-5)


def test_several_active_adapters_add_their_changes() -> None:
    model = two_on_bert()
    layer, x = tuner_layers(model)[PATH.format(1)], torch.randn(2, 3, 36)
    base = layer.base_output(x)
    parts = []
    for active in (["first", "second"], "first", "second"):
        layer.set_adapter(active)  # of the model only one can be, because of the head
        parts.append(layer(x) - base)
    both, *parts = parts
    torch.testing.assert_close(both, parts[0] + parts[1], atol=1e-5, rtol=1e-5)


def test_copies_and_recording() -> None:
    model = adapted("mixlora", "bert")
    other = copy.deepcopy(model)
    layer = tuner_layers(other)[PATH.format(0)]
    second = other.get_submodule("base_model.model.bert.encoder.layer.0.output.dense")
    assert layer.linear("down") is second.base_layer
    assert second.__dict__["mixture"] is layer
    assert torch.equal(outputs(other, "bert"), outputs(model, "bert"))
    with record_routing(other) as listener:
        outputs(other, "bert")
        assert [record.layer for record in listener.records] == [PATH.format(0), PATH.format(1)]
        assert listener.records[0].valid_tokens == int(tiny_batch("bert")["attention_mask"].sum())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted("mixlora", "bert").train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model(**tiny_batch("bert")).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-7, rtol=1e-5)
        assert gradient.abs().max() > 0


def test_trained_biases_of_both_halves(tmp_path: Path) -> None:
    model = adapted("mixlora", "bert", bias="moelora_only")
    biases = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    for part in ("intermediate.base_layer.dense.bias", "0.output.dense.base_layer.bias", "query.base_layer.bias"):
        assert any(name.endswith(part) for name in biases)
    for name in biases:
        model.get_parameter(name).data += 0.5
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path))
    assert torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))


@pytest.mark.parametrize(("first", "second"), [("mixlora", "sira"), ("sira", "mixlora")])
@pytest.mark.parametrize("target", ["intermediate.dense", "layer.0.output.dense"])
def test_adapters_that_treat_the_block_differently_are_refused(first: str, second: str, target: str) -> None:
    words: dict[str, dict[str, Any]] = {"mixlora": {}, "sira": {"target_modules": [target]}}
    model = adapted(first, "bert", adapter_name="first", **words[first])
    before, logits = snapshot(model), outputs(model, "bert")
    with pytest.raises(TargetError, match="allowed: adapters that treat a feed-forward block alike"):
        model.add_adapter("second", small_config(second, "bert", **words[second]))
    assert snapshot(model) == before
    assert torch.equal(outputs(model, "bert"), logits)


def test_injection_by_a_state_dict() -> None:
    model = adapted("mixlora", "bert", task_type=None)
    state_dict = {key.removeprefix("base_model.model."): v for key, v in get_peft_model_state_dict(model).items()}
    injected = inject_adapter_in_model(
        small_config("mixlora", "bert", task_type=None), tiny_model("bert"), state_dict=state_dict
    )
    assert len(pass_throughs(injected)) == 2


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(6, 10), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.dense(x))
        return y


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(10, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.norm(self.dense(x) + residual)
        return y


class OddFirst(First):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=5)


class OddSecond(Second):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().forward(x * 2, residual)


class Layer(nn.Module):
    def __init__(self, first: type[First] = First, second: type[Second] = Second) -> None:
        super().__init__()
        self.a, self.b = first(), second()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x), x)
        return y


class ChangesInBetween(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x) * 0.5, x)
        return y


def config() -> MoeLoraConfig:
    return MoeLoraConfig(placement="feed_forward")


def test_the_halves_are_found_by_their_structure() -> None:
    model = nn.ModuleDict({"layer": Layer()})
    (block,) = set(find_split_blocks(dict(base_modules(model))).values())
    assert block.linears == {"up": "layer.a.dense", "down": "layer.b.dense"}
    wrapped = get_peft_model(Layer(), config())
    x = torch.randn(2, 3, 6)
    assert wrapped(x).shape == x.shape


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Layer(first=OddFirst), r"'a' \(OddFirst\) looks like half of .* computes something else than act\(up x\)"),
        (Layer(second=OddSecond), r"'b' \(OddSecond\) looks like half .* 'dense' does not read its first argument as"),
    ],
)
def test_odd_halves_are_refused_by_name(layer: Layer, message: str) -> None:
    before = snapshot(layer)
    with pytest.raises(TargetError, match=message):
        get_peft_model(layer, config())
    assert snapshot(layer) == before


def test_something_between_the_halves_is_refused_at_the_first_forward() -> None:
    model = get_peft_model(ChangesInBetween(), config())
    with pytest.raises(TargetError, match="'a' was read as the first half .* changes its output before the second"):
        model(torch.randn(2, 3, 6))
    with model.disable_adapter():
        model(torch.randn(2, 3, 6))


class ChangesInPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).mul_(0.5), x)
        return y


def test_a_change_in_place_between_the_halves_is_refused_too() -> None:
    model = get_peft_model(ChangesInPlace(), config())
    with torch.no_grad(), pytest.raises(TargetError, match="'a' was read as the first half .* changes its output"):
        model(torch.randn(2, 3, 6))


class Meets(Layer):
    """Waits between its halves until another thread is there too."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["barrier"] = threading.Barrier(2, timeout=30)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        self.__dict__["barrier"].wait()
        y: Tensor = self.b(hidden, x)
        return y


@pytest.mark.parametrize("gradients", [False, True])
def test_two_threads_between_the_halves_at_once(gradients: bool) -> None:
    base = Meets()
    model = get_peft_model(base, config())
    shake(model)
    inputs = [torch.randn(2, 3, 6), torch.randn(4, 5, 6)]

    def run(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(gradients):
            y: Tensor = model(x)
            return y

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, inputs))
    base.__dict__["barrier"] = threading.Barrier(1)
    for x, y in zip(inputs, together, strict=True):
        assert torch.equal(y, run(x))
        assert y.requires_grad is gradients


@pytest.mark.parametrize("gradients", [False, True])
def test_two_threads_running_one_model(gradients: bool) -> None:
    model = adapted("mixlora", "bert")
    batches = [tiny_batch("bert", batch_size=2 + seed % 2, seed=seed) for seed in range(24)]

    def run(batch: dict[str, Tensor]) -> Tensor:
        with torch.set_grad_enabled(gradients):
            logits: Tensor = model(**batch).logits
            return logits

    expected = [run(batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(run, batches))
    finally:
        sys.setswitchinterval(interval)
    for y, y_alone in zip(found, expected, strict=True):
        torch.testing.assert_close(y, y_alone, atol=1e-6, rtol=1e-5)


def test_compiled_graphs_and_inference_tensors() -> None:
    model = get_peft_model(Layer(), config()).eval()
    shake(model)
    x = torch.randn(2, 3, 6)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_other_neighbours_are_no_block() -> None:
    shapes = nn.ModuleList([First(), nn.Sequential(nn.Linear(9, 6))])  # sizes do not meet
    both = nn.ModuleList([First(), First()])  # an activation in the second
    assert not find_split_blocks(dict(base_modules(shapes)))
    assert not find_split_blocks(dict(base_modules(both)))
