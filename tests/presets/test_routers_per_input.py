"""One router for queries, keys and values, and one for gate and up: the same as if each site asked it by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor

from moelora import MoeLoraConfig, record_routing
from moelora.compose import drop_experts
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.routing.record import ModelRun
from moelora.routing.router import Router
from tests.adapters import (
    adapted,
    adapter_tensors,
    assert_close_gradients,
    assert_equal_tensors,
    gradients,
    outputs,
    router_biases,
    small_config,
    stacks,
    train_steps,
    tuner_layers,
)
from tests.conftest import tiny_batch, tiny_model
from tests.training.runs import assert_same_step, checkpointing_words, toy_rows, train

PRESETS = ("sira", "molora", "smora")
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
every_preset = pytest.mark.parametrize("preset", PRESETS)


def shared(preset: str, model: str = "llama", **words: Any) -> Any:
    return adapted(preset, model, routers="per_input", **words)


def ask_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive form: every site asks the router that it shares."""

    def naive(run: ModelRun, adapter: str, router: Any, place: Any, x: Tensor, decide: Callable[[], Any]) -> Any:
        return decide()

    monkeypatch.setattr(ModelRun, "once", naive)


def decisions(model: Any, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> int:
    """How often a router decides in a forward."""
    count, forward = [], Router.forward

    def counted(router: Router, *args: Any, **kwargs: Any) -> Any:
        count.append(router)
        return forward(router, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Router, "forward", counted)
        outputs(model, **inputs)
    return len(count)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}] * 2),
        ("phi", [{"q_proj", "k_proj", "v_proj"}, {"dense"}, {"fc1"}, {"fc2"}] * 2),
        ("gpt2", [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}] * 2),
        ("bert", [*[{"query", "key", "value"}, {"dense"}, {"dense"}, {"dense"}] * 2, {"dense"}]),
    ],
)
def test_who_shares_a_router(name: str, groups: list[set[str]]) -> None:
    layers = tuner_layers(get_peft_model(tiny_model(name), small_config("molora", name, routers="per_input")))
    found: dict[int, list[str]] = {}
    for path, layer in layers.items():
        found.setdefault(id(layer.routers["default"]), []).append(path)
    assert [{path.rpartition(".")[2] for path in paths} for paths in found.values()] == groups
    for paths in found.values():
        assert [path for path in paths if "default" in layers[path].moelora_router] == paths[:1]
        assert len({path.rpartition(".")[0] for path in paths}) == 1


def test_queries_of_cross_attention_have_a_router_of_their_own() -> None:
    layers = tuner_layers(get_peft_model(tiny_model("t5"), small_config("molora", "t5", routers="per_input")))
    cross = {path.rpartition(".")[2]: layer for path, layer in layers.items() if "block.0.layer.1.EncDec" in path}
    assert cross["k"].routers["default"] is cross["v"].routers["default"]
    assert cross["q"].routers["default"] is not cross["k"].routers["default"]
    own = {path.rpartition(".")[2]: layer for path, layer in layers.items() if "decoder.block.0.layer.0" in path}
    assert own["q"].routers["default"] is own["k"].routers["default"]


@every_preset
def test_the_router_decides_once_and_nothing_else_changes(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and all gradients are those of sites that ask the same router each by itself."""
    words: dict[str, Any] = {"expert_dropout": 0.0} if preset == "sira" else {}
    model = shared(preset, **words)
    found = outputs(model), gradients(model)
    assert decisions(model, monkeypatch) == 8
    ask_each_by_itself(monkeypatch)
    naive = shared(preset, **words)
    torch.testing.assert_close(found[0], outputs(naive), rtol=0, atol=0)
    assert_close_gradients(found[1], gradients(naive))
    assert decisions(naive, monkeypatch) == 14
    assert (found[0] - outputs(adapted(preset, **words))).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_encoders_and_cross_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = outputs(shared("molora", name), name)
    ask_each_by_itself(monkeypatch)
    torch.testing.assert_close(found, outputs(shared("molora", name), name), rtol=0, atol=0)


def test_a_group_equals_the_reference() -> None:
    model = shared("molora")
    layers, holder = tuner_layers(model), tuner_layers(model)["model.layers.1.self_attn.q_proj"]
    weight = holder.moelora_router["default"].get_parameter("weight")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = layers[f"model.layers.1.self_attn.{name}"]
        layer.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    outputs(model)
    for name, (x, y) in seen.items():
        layer, x_TD = layers[f"model.layers.1.self_attn.{name}"], x.flatten(0, 1)
        gates_TE = (x_TD @ weight.t()).softmax(-1)
        delta_TO = reference.mixture_linear(x_TD, *stacks(layer, ""), gates_TE, layer.scaling["default"])
        torch.testing.assert_close(y.flatten(0, 1), layer.base_layer(x_TD) + delta_TO, rtol=1e-4, atol=1e-5)


@every_preset
def test_another_input_is_another_decision(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from one forward to the next, nor of an input that was changed in between."""
    model = shared(preset)
    first = outputs(model)
    other = outputs(model, input_ids=tiny_batch(seed=3)["input_ids"])
    assert torch.equal(outputs(model), first)
    assert not torch.equal(other, first)

    def change(module: Any, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].add_(0.5)

    tuner_layers(model)["model.layers.0.self_attn.k_proj"].register_forward_pre_hook(change)
    changed = outputs(model)
    ask_each_by_itself(monkeypatch)
    assert torch.equal(outputs(model), changed)
    assert not torch.equal(changed, first)


# in a BERT the layer's own input goes to the projections
@pytest.mark.parametrize(("preset", "name"), [*((preset, "llama") for preset in PRESETS), ("molora", "bert")])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(preset: str, name: str, reentrant: bool) -> None:
    words: dict[str, Any] = {"expert_dropout": 0.0} if preset == "sira" else {}
    calm: dict[str, Any] = dict.fromkeys(DROPOUTS, 0.0) if name == "bert" else {}
    found = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny_model(name, **calm), small_config(preset, name, routers="per_input", **words))
        model.load_state_dict(shared(preset, name, **words).state_dict())
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        found.append(gradients(model, tiny_batch(name), tiny_batch(name, seed=1)))
    assert_close_gradients(found[1], found[0])


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_a_trainers_step_with_a_balance_loss(reentrant: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"balance_coef": 1.0, "expert_dropout": 0.0, "lora_alpha": 0.3}
    run = train(shared("sira", **words), toy_rows(), batch=2, accumulate=2, **checkpointing_words(reentrant))
    ask_each_by_itself(monkeypatch)
    assert_same_step(run, train(shared("sira", **words), toy_rows()))


def test_expert_dropout_is_drawn_once() -> None:
    model = shared("sira", expert_dropout=0.5).train()
    with record_routing(model) as recorder:
        model(**tiny_batch())
    by_layer = {record.layer: record.routing for record in recorder.records}
    assert len(by_layer) == 14
    of = {name: by_layer[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert of["q_proj"] is of["k_proj"] is of["v_proj"]
    assert of["o_proj"] is not of["q_proj"]


def test_a_bias_moves_once_for_all_its_sites() -> None:
    model = shared("smora", bias_update_rate=0.1).train()
    before = router_biases(model)
    assert len(before) == 8
    with record_routing(model) as recorder:
        model(**tiny_batch())
    records = {record.layer: record for record in recorder.records}
    for name, bias in router_biases(model).items():
        layer = name.removeprefix("base_model.model.").partition(".moelora_router")[0]
        record = records[layer]
        assert record.routing.ids_TK is not None
        expected = reference.bias_update(before[name], record.routing.ids_TK[record.valid_T], 0.1)
        torch.testing.assert_close(bias, expected)


@every_preset
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_the_cache_change_nothing(preset: str, side: str) -> None:
    model = shared(preset)
    ids = tiny_batch(batch_size=1, length=7)["input_ids"]
    place = slice(5, 12) if side == "left" else slice(0, 7)
    row, mask = torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long)
    row[0, place], mask[0, place] = ids[0], 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    alone = outputs(model, input_ids=ids, attention_mask=None, labels=None)[0]
    padded = outputs(model, input_ids=row, attention_mask=mask, labels=None, position_ids=positions)[0]
    torch.testing.assert_close(padded[place], alone, rtol=1e-4, atol=5e-6)
    words: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=ids.clamp_min(3), use_cache=True, **words)
    assert torch.equal(cached, model.generate(input_ids=ids.clamp_min(3), use_cache=False, **words))


@every_preset
def test_saving_loading_and_hot_swap(preset: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), small_config(preset, routers="per_input"))
    train_steps(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    assert_equal_tensors(adapter_tensors(loaded), adapter_tensors(model))
    assert torch.equal(outputs(loaded), outputs(model.eval()))
    swapped = shared(preset, seed=5)
    hotswap_adapter(swapped, str(tmp_path), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(outputs(swapped), outputs(model), rtol=0, atol=1e-6)
    per_site = get_peft_model(tiny_model(), small_config(preset))
    assert len(adapter_tensors(per_site)) > len(adapter_tensors(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = small_config(preset, routers="per_input")
    assert config.num_trainable_parameters(tiny_model()) == trained


def test_a_row_may_choose_its_adapter() -> None:
    model = shared("molora")
    model.add_adapter("second", small_config("molora", routers="per_input"))
    model.set_adapter("second")
    second = outputs(model)
    model.set_adapter("default")
    first, batch = outputs(model), tiny_batch()
    mixed = outputs(model, adapter_names=["second", "default", "second"])
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(mixed[valid], torch.stack([second[0], first[1], second[2]])[valid], rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "second"])
    assert outputs(model).isfinite().all()


def test_an_edit_keeps_the_sites_of_a_router_together(tmp_path: Path) -> None:
    shared("molora").save_pretrained(str(tmp_path / "old"))
    drop_experts(tmp_path / "old", tmp_path / "new", [1])
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "new")).eval()
    assert outputs(loaded).isfinite().all()
    for layer in tuner_layers(loaded).values():
        assert layer.routers["default"].num_experts == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"placement": {"kind": "feed_forward", "routers": "per_input"}},
            "placement is 'feed_forward'.*allowed: 'linear'",
        ),
        ({"scores": "prototypes"}, "scores is 'prototypes'; allowed: 'linear' with placement.routers='per_input'"),
        ({"experts": "dora"}, "experts is 'dora'; allowed: LoRAs with"),
        ({"experts": {"kind": "lora", "per_layer": [2, 8]}}, "allowed: as many experts in every layer with"),
    ],
)
def test_what_it_refuses(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(**{"placement": {"kind": "linear", "routers": "per_input"}, **words})
