"""What an adapter computes: the base model at B = 0, PEFT's LoRA with one expert, and no leak across a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from moelora.layers.split_feed_forward import MixtureSplitFeedForward
from moelora.ops.compute import Reference
from tests.adapters import (
    BLOCK_PRESETS,
    KEEPS_BASE,
    PRESETS,
    adapted,
    adapted_linears,
    outputs,
    shake,
    small_config,
    stacks,
    task_type,
    tuner_layers,
)
from tests.conftest import tiny_batch, tiny_model

# One of each form of block, Conv1D, an encoder-decoder and an encoder.
FORMS = ("llama", "phi", "phi3", "gpt2", "t5", "bert")
# One of each kind of layer: a block, linears, experts of rank one, a shared A, no mixture.
KINDS = ("mixlora", "sira", "smora", "hydralora", "lora", "adamole")


def combinations(models: tuple[str, ...]) -> list[Any]:
    """Every preset on a Llama; elsewhere, where only the layers differ, one of each kind of layer."""
    return [
        pytest.param(preset, name, id=f"{preset}-{name}")
        for name in models
        for preset in (PRESETS if name == "llama" else KINDS)
    ]


@pytest.mark.parametrize(("preset", "name"), combinations(FORMS))
def test_b_zero_gives_the_base_model(preset: str, name: str) -> None:
    overrides: dict[str, Any] = {"dropout_rate": 0.0} if name == "t5" else {}
    base = outputs(tiny_model(name), name)
    model = get_peft_model(tiny_model(name, **overrides), small_config(preset, name, **KEEPS_BASE.get(preset, {})))
    # sira does not renormalise its weights and molora's sum to one: on a single linear neither touches the base
    torch.testing.assert_close(outputs(model, name), base, atol=2e-6, rtol=1e-5)
    if preset not in BLOCK_PRESETS:
        assert torch.equal(outputs(model, name), base)
    if preset == "sira" or name not in ("llama", "t5"):
        return
    model.train()
    torch.testing.assert_close(outputs(model, name), base, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("preset", "name"), combinations(FORMS))
def test_an_adapter_changes_the_outputs(preset: str, name: str) -> None:
    model = adapted(preset, name)
    assert (outputs(model, name) - outputs(tiny_model(name), name)).abs().max() > 1e-3


def assert_same(actual: Tensor, expected: Tensor, ratio: float = 1e-6) -> None:
    """Equal to `ratio` of the largest value."""
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= ratio * largest, f"{difference} of {largest}"


def one_expert(preset: str, name: str, **words: Any) -> Any:
    """A preset with a single expert, without its random parts."""
    words = {**words, "lora_dropout": 0.0}
    if preset == "smora":
        return small_config(preset, name, **{**words, "r": 1, "top_k": 1})
    if preset == "lora":
        return small_config(preset, name, **words)
    if preset == "sira":
        words |= {"expert_dropout": 0.0, "capacity_factor": None}
    if preset == "mixlora_switch":
        words["capacity"] = None
    if preset in ("mixlora", "random_router", "sira"):
        words |= {"top_k": 1}
    return small_config(preset, name, num_experts=1, **words)


def as_peft_lora(model: Any, name: str, **overrides: Any) -> Any:
    """PEFT's own LoRA with the weights of the first expert of every layer."""
    config = model.peft_config["default"].experts
    sources = adapted_linears(model)
    lora_config = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        target_modules=list(sources),
        task_type=task_type(name),
    )
    lora = get_peft_model(tiny_model(name, **overrides), lora_config)
    for path, layer in tuner_layers(lora).items():
        _, source, role = sources[path]
        a, b = stacks(source, role)
        layer.lora_A["default"].weight.data = a[0].detach().clone()
        layer.lora_B["default"].weight.data = b[0].detach().clone()
    return lora


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad and p.grad is not None}


CALM: dict[str, dict[str, Any]] = {
    "gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    # and smaller weights: its unscaled attention makes a tiny random model chaotic
    "t5": {"dropout_rate": 0.0, "initializer_factor": 0.3},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@pytest.mark.parametrize(("preset", "name"), combinations(FORMS))
def test_one_expert_is_pefts_lora_in_a_model(preset: str, name: str) -> None:
    # double precision, since rounding adds up over the layers; the models' norms round to single precision all the same
    words = CALM.get(name, {})
    model = get_peft_model(tiny_model(name, **words).double(), one_expert(preset, name))
    shake(model, seed=1)
    lora = as_peft_lora(model, name, **words).double()
    for training in (False, True):
        model.train(training)
        lora.train(training)
        assert_same(outputs(model, name), outputs(lora, name), ratio=1e-5)
        ours, theirs = gradients(model, tiny_batch(name)), gradients(lora, tiny_batch(name))
        for path, (layer_path, _, role) in adapted_linears(model).items():
            for factor in ("A", "B"):
                found = ours.pop(f"base_model.model.{layer_path}.moelora_{factor}.default.{role or 'weight'}")[0]
                assert_same(found, theirs.pop(f"base_model.model.{path}.lora_{factor}.default.weight"), ratio=1e-5)
        for key, gradient in theirs.items():  # heads trained whole
            assert_same(ours.pop(key), gradient, ratio=1e-5)
        # what is left are routers: with one expert its weight is 1 whatever they say
        assert all("moelora_router" in key for key in ours)
        assert all(gradient.abs().max() < 1e-6 for gradient in ours.values())


@pytest.mark.parametrize(("preset", "name"), combinations(FORMS))
def test_one_expert_is_pefts_lora_in_each_layer(preset: str, name: str) -> None:
    model = get_peft_model(tiny_model(name), one_expert(preset, name)).eval()
    shake(model)
    lora = as_peft_lora(model, name).eval()
    seen = set()
    linears = adapted_linears(model)
    for path, layer in tuner_layers(model).items():
        kind = path.rpartition(".")[-1]
        if kind in seen:
            continue
        seen.add(kind)
        other = lora.get_submodule(f"base_model.model.{path}")
        if isinstance(layer, MixtureSplitFeedForward):
            (second,) = (name for name, (_, owner, role) in linears.items() if owner is layer and role == "down")
            other = nn.Sequential(other, lora.get_submodule(f"base_model.model.{second}"))
        x = torch.randn(
            2,
            5,
            next(size for role, size in layer.linear_sizes().items() if role in ("", "up"))[0],
            generator=torch.Generator().manual_seed(1),
        )
        results = []
        for each in (layer, other):
            each.zero_grad()
            leaf = x.clone().requires_grad_()
            y = each(leaf)
            (y * torch.linspace(-1, 1, y.shape[-1])).mean().backward()
            results.append((y.detach(), leaf.grad))
        for ours, theirs in zip(*results, strict=True):
            assert_same(ours, theirs)
        for name, (_, owner, role) in linears.items():
            if owner is layer:
                linear = lora.get_submodule(f"base_model.model.{name}")
                for stack, factor in zip(stacks(layer, role), (linear.lora_A, linear.lora_B), strict=True):
                    assert stack.grad is not None
                    assert_same(stack.grad[0], factor["default"].weight.grad)
    assert len(seen) >= 3


def test_one_expert_is_pefts_lora_with_rslora_and_dropout_of_the_same_draw() -> None:
    model = get_peft_model(tiny_model().double(), small_config("lora", use_rslora=True))
    shake(model)
    lora = as_peft_lora(model, "llama").double()
    assert_same(outputs(model), outputs(lora))
    for each, dropouts in ((model, "moelora_dropout"), (lora, "lora_dropout")):
        each.train()
        for layer in tuner_layers(each).values():
            getattr(layer, dropouts)["default"] = nn.Dropout(0.5)
    drawn = []
    for each in (model, lora):
        torch.manual_seed(3)
        drawn.append(outputs(each))
    assert_same(drawn[0], drawn[1])


@pytest.mark.parametrize("preset", ["mixlora", "sira", "smora", "molora"])
def test_experts_start_as_lora_does(preset: str) -> None:
    words: dict[str, Any] = {"num_experts": 1, "r": 16, "top_k": 1} if preset in ("mixlora", "sira") else {}
    torch.manual_seed(5)
    model = get_peft_model(tiny_model("llama", hidden_size=192, num_hidden_layers=1), small_config(preset, **words))
    config = model.peft_config["default"].experts
    for layer in tuner_layers(model).values():
        for role, (in_features, _) in layer.linear_sizes().items():
            a, b = stacks(layer, role)
            assert not b.any()
            if config.init == "normal":
                assert abs(a.std().item() / 0.02 - 1) < 0.15
            else:  # kaiming_uniform_(a=sqrt(5)) is U(-1/sqrt(in), 1/sqrt(in)), for each expert alone
                assert 0.9 * in_features**-0.5 < a.abs().max().item() <= in_features**-0.5
                assert abs(a.std().item() * (3 * in_features) ** 0.5 - 1) < 0.15


def padded(ids: Tensor, length: int, side: str) -> tuple[Tensor, Tensor]:
    pad = torch.zeros(ids.shape[0], length - ids.shape[1], dtype=ids.dtype)
    ones = torch.ones_like(ids)
    parts = ([ids, pad], [ones, pad]) if side == "right" else ([pad, ids], [pad, ones])
    return torch.cat(parts[0], 1), torch.cat(parts[1], 1)


# On a Llama, of every preset: tests/presets/test_properties.py; so the cache and the gradients.
@pytest.mark.parametrize(
    ("preset", "name"), [*((preset, "phi") for preset in KINDS), ("sira in_eval", "phi"), ("sira in_eval", "llama")]
)
def test_padding_and_batch_mates_change_nothing(preset: str, name: str) -> None:
    preset, _, in_eval = preset.partition(" ")
    words: dict[str, Any] = {"capacity_in_eval": True, "capacity_factor": 0.7} if in_eval else {}
    model = adapted(preset, name, **words)
    ids = tiny_batch(name, batch_size=1, length=7)["input_ids"]
    others = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(9))
    alone = outputs(model, name, input_ids=ids, attention_mask=None, labels=None)
    for side in ("right", "left"):
        row, mask = padded(ids, 12, side)
        for mates in (others[:0], others):
            mates_rows, mates_mask = padded(mates, 12, "left" if side == "right" else "right")
            batch = {"input_ids": torch.cat([row, mates_rows]), "attention_mask": torch.cat([mask, mates_mask])}
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            logits = outputs(model, name, **batch, position_ids=positions, labels=None)
            torch.testing.assert_close(logits[0][mask[0].bool()], alone[0], atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", KINDS)
@pytest.mark.parametrize("name", ["t5", "bert"])
def test_padding_and_batch_mates_change_nothing_in_encoders(preset: str, name: str) -> None:
    model = get_peft_model(tiny_model(name, **CALM[name]), small_config(preset, name)).eval()
    shake(model)
    batch = tiny_batch(name, batch_size=3, length=9)
    batch["labels"] = None  # type: ignore[assignment]
    if name == "t5":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4].clamp_min(3)
    together = outputs(model, name, **batch)
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        one = {key: None if value is None else value[row : row + 1] for key, value in batch.items()}
        one |= {key: one[key][:, :length] for key in ("input_ids", "attention_mask")}
        torch.testing.assert_close(together[row], outputs(model, name, **one)[0], atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["mixlora", "smora"])
def test_generation_with_beams(preset: str) -> None:
    model = adapted(preset)
    ids = tiny_batch(batch_size=2, length=6)["input_ids"].clamp_min(3)
    words = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=ids, **words)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **words))


@pytest.mark.parametrize("preset", ["mixlora", "sira", "smora"])
def test_fast_operations_equal_the_references_in_a_model(preset: str) -> None:
    model = adapted(preset, "phi")
    fast = outputs(model, "phi")
    gradients_fast = gradients(model, tiny_batch("phi"))
    model.peft_config["default"].compute = Reference()
    torch.testing.assert_close(outputs(model, "phi"), fast, atol=1e-5, rtol=1e-5)
    gradients_slow = gradients(model, tiny_batch("phi"))
    assert gradients_fast.keys() == gradients_slow.keys()
    for key, gradient in gradients_fast.items():
        torch.testing.assert_close(gradients_slow[key], gradient, atol=1e-5, rtol=1e-4)


def test_reference_with_dropout_is_refused() -> None:
    config = small_config("mixlora", lora_dropout=0.1, compute="reference")
    model = get_peft_model(tiny_model(), config).train()
    with pytest.raises(ValueError, match=r"'reference' and a feed-forward mixture trains with LoraDropout"):
        model(**tiny_batch())


@pytest.mark.parametrize("preset", ["sira", "smora"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_draws_and_moves_biases_once(preset: str, reentrant: bool) -> None:
    found, biases = [], []
    for checkpointing in (False, True):
        # sira draws: the second run of a layer has to repeat them
        model = adapted(preset, lora_dropout=0.3).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(11)
        found.append(gradients(model, tiny_batch()))
        biases.append({key: value for key, value in model.state_dict().items() if key.endswith("default.bias")})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-7, rtol=1e-5)
        if "moelora_router" in key:
            assert gradient.abs().max() > 0
    assert len(biases[0]) == (14 if preset == "smora" else 0)
    for key, bias in biases[0].items():
        assert torch.equal(biases[1][key], bias)
