"""`layers_to_transform` takes layers of one stack, or of those that `layers_pattern` names."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from moelora import MoeLoraConfig
from moelora.errors import ConfigError, TargetError
from moelora.inject.stacks import layer_of
from tests.adapters import small_config, snapshot, tuner_layers
from tests.conftest import tiny_model
from tests.inject.bases import llava, qwen2_vl, seeded

GATED = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("word", [{"layers_to_transform": [1]}, {"layers_to_transform": 1, "layers_pattern": "layers"}])
@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR", r".*\.q_proj"])
def test_a_string_of_targets_is_refused_as_in_peft(targets: str, word: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a str"):
        LoraConfig(target_modules=targets, **word)
    with pytest.raises(ConfigError, match="List the module names in target_modules"):
        MoeLoraConfig(target_modules=targets, **word)
    with pytest.raises(ConfigError, match="List the module names in target_modules"):
        small_config("mixlora", target_modules=targets, **word)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.1.mlp.up_proj", None, ("", "model.layers", 1)),
        ("encoder.block.1.layer.0.SelfAttention.q", None, ("", "encoder.block", 1)),
        ("encoder.block.1.layer.0.SelfAttention.q", "layer", ("layer", "encoder.block.*.layer", 0)),
        ("model.text.layers.2.mlp.up_proj", ["h", "text.layers"], ("text.layers", "model.text.layers", 2)),
        ("layers.2.mlp.up_proj", "layers", ("layers", "layers", 2)),
        ("layers.2.mlp.up_proj", None, None),
        ("bert.pooler.dense", None, None),
        ("model.layers.1.mlp.up_proj", "h", None),
    ],
)  # fmt: skip
def test_where_a_module_is(name: str, pattern: Any, expected: Any) -> None:
    assert layer_of(name, pattern) == expected


def test_a_model_of_two_towers_with_the_names_of_one() -> None:
    config = small_config("mixlora", target_modules=["q_proj", *GATED], layers_to_transform=[1])
    sites = set(tuner_layers(get_peft_model(seeded(qwen2_vl), config)))
    prefix = "model.language_model.layers.1"
    assert sites == {f"{prefix}.self_attn.q_proj", f"{prefix}.mlp"}


def test_names_of_both_towers_are_refused_where_peft_takes_both() -> None:
    words: dict[str, Any] = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    both = ["model.language_model.layers", "model.vision_tower.encoder.layers"]
    lora = get_peft_model(seeded(llava), LoraConfig(**words))
    assert set(tuner_layers(lora)) == {f"{stack}.1.self_attn.q_proj" for stack in both}
    model = seeded(llava)
    before = snapshot(model)
    for pattern in (None, "layers"):
        with pytest.raises(TargetError, match=r"picks layers of 2 stacks") as error:
            get_peft_model(model, small_config("sira", **words, layers_pattern=pattern))
        assert f"({', '.join(both)})" in str(error.value)
        assert f"layers_pattern={both!r}" in str(error.value)
        assert snapshot(model) == before


@pytest.mark.parametrize("name", ["language_model.layers", "vision_tower.encoder.layers"])
def test_the_stack_can_be_named(name: str) -> None:
    words: dict[str, Any] = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": name}
    assert set(tuner_layers(get_peft_model(seeded(llava), small_config("sira", **words)))) == {
        f"model.{name}.1.self_attn.q_proj"
    }


def test_both_stacks_can_be_named() -> None:
    words: dict[str, Any] = {"target_modules": ["q", "wi", "wo"], "layers_to_transform": [1]}
    model = tiny_model("t5")
    with pytest.raises(TargetError, match=r"2 stacks \(decoder\.block, encoder\.block\)"):
        get_peft_model(model, small_config("mixlora", "t5", **words))
    words["layers_pattern"] = ["decoder.block", "encoder.block"]
    sites = tuner_layers(get_peft_model(model, small_config("mixlora", "t5", **words)))
    assert {".".join(site.split(".")[:3]) for site in sites} == {"encoder.block.1", "decoder.block.1"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("model.layers.0.self_attn.q_proj", r"named in full and is in layer 0 of 'model\.layers'"),
        ("lm_head", "'lm_head' is named in full and is in no layer"),
    ],
)
def test_a_full_name_outside_the_layers_is_refused(target: str, message: str) -> None:
    # PEFT takes it, whatever the layers
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, small_config("sira", target_modules=["v_proj", target], layers_to_transform=[1]))
    assert snapshot(model) == before
