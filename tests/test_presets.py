"""Presets: their defaults, their words, and that none is a code path of its own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import moelora
from moelora import BalanceConfig, ExpertsConfig, MoeLoraConfig, PlacementConfig, RoutingConfig, presets
from moelora.errors import ConfigError
from tests.adapters import PRESETS

# The papers' settings (reference in each docstring), written out once more.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixlora": {
        "experts": ExpertsConfig(num_experts=8, r=16, lora_alpha=32, lora_dropout=0.05),
        "placement": PlacementConfig(feed_forward=True, unrouted_modules="rest"),
        "routing": RoutingConfig(score="softmax", top_k=2, renormalize=True, init_std=0.02),
        "balance": BalanceConfig(loss="switch", coef=1e-2),
    },
    "sira": {
        "experts": ExpertsConfig(num_experts=16, r=4, lora_alpha=4),
        "placement": PlacementConfig(),
        "routing": RoutingConfig(
            score="softmax", top_k=4, renormalize=False, init_std=None, expert_dropout=0.5, capacity_factor=1.25
        ),
        "balance": BalanceConfig(loss="switch", coef=1e-2),
    },
    "smora": {
        "experts": ExpertsConfig(num_experts=64, r=1, lora_alpha=16),
        "placement": PlacementConfig(),
        "routing": RoutingConfig(score="sigmoid", top_k=8, renormalize=True, init_std=None, bias_update_rate=1e-5),
        "balance": BalanceConfig(),
    },
    "molora": {
        "experts": ExpertsConfig(num_experts=10, r=4, lora_alpha=16, init="normal", init_std=0.02),
        "placement": PlacementConfig(),
        "routing": RoutingConfig(score="softmax", top_k=None, renormalize=False, init_std=0.02),
        "balance": BalanceConfig(),
    },
    "random_router": {
        "experts": ExpertsConfig(num_experts=8, r=16, lora_alpha=32, lora_dropout=0.05),
        "placement": PlacementConfig(feed_forward=True, unrouted_modules="rest"),
        "routing": RoutingConfig(score="softmax", top_k=2, renormalize=True, init_std=0.02, trainable=False),
        "balance": BalanceConfig(),
    },
    "lora": {
        "experts": ExpertsConfig(num_experts=1, r=16, lora_alpha=32),
        "placement": PlacementConfig(unrouted_modules=".*"),
        "routing": RoutingConfig(top_k=1),
        "balance": BalanceConfig(),
    },
}
LORA_WORDS = {"r", "lora_alpha", "lora_dropout"}
PEFT_WORDS = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "task_type",
    "trainable_token_indices",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}


def test_available() -> None:
    assert set(moelora.presets.available()) == set(DEFAULTS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_defaults(name: str) -> None:
    config = MoeLoraConfig.from_preset(name)
    assert {axis: getattr(config, axis) for axis in DEFAULTS[name]} == DEFAULTS[name]
    assert config.preset == name
    assert config.target_modules == "all-linear"
    assert config.compute == moelora.ComputeConfig()
    assert config == getattr(presets, name)()


@pytest.mark.parametrize("name", PRESETS)
def test_words(name: str) -> None:
    words = presets.words(name)
    assert len(words) == len(set(words))
    assert set(words) >= LORA_WORDS | PEFT_WORDS
    assert not set(words) & {"experts", "routing", "preset", "format_version", "moelora_version", "peft_type"}


# A value for each word that differs from every default, and where it ends up.
OWN_WORDS: dict[str, tuple[Any, str]] = {
    "lora_alpha": (7.0, "experts.lora_alpha"),
    "lora_dropout": (0.3, "experts.lora_dropout"),
    "use_rslora": (True, "experts.use_rslora"),
    "num_experts": (5, "experts.num_experts"),
    "top_k": (3, "routing.top_k"),
    "renormalize": (True, "routing.renormalize"),
    "router_init_std": (0.7, "routing.init_std"),
    "expert_dropout": (0.2, "routing.expert_dropout"),
    "capacity_factor": (3.0, "routing.capacity_factor"),
    "capacity_in_eval": (True, "routing.capacity_in_eval"),
    "bias_update_rate": (0.1, "routing.bias_update_rate"),
    "balance_loss": ("mixtral", "balance.loss"),
    "balance_coef": (0.7, "balance.coef"),
    "balance_scope": ("micro_batch", "balance.scope"),
    "z_loss_coef": (0.3, "balance.z_loss_coef"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_word_of_a_preset_reaches_its_field(name: str) -> None:
    own = [word for word in inspect.signature(getattr(presets, name)).parameters if word not in ("r", "peft_words")]
    for word in own:
        value, path = OWN_WORDS[word]
        part, field = path.split(".")
        config = MoeLoraConfig.from_preset(name, **{word: value})
        assert getattr(getattr(config, part), field) == value, word
        other = MoeLoraConfig.from_preset(name)
        setattr(getattr(other, part), field, value)
        assert config == other, f"{word} changes more than {path}"


@pytest.mark.parametrize("name", PRESETS)
def test_r_is_the_rank_of_one_expert_and_the_total_of_single_rank_presets(name: str) -> None:
    experts = MoeLoraConfig.from_preset(name, r=12).experts
    assert (experts.num_experts, experts.r) == ((12, 1) if name == "smora" else (experts.num_experts, 12))


@pytest.mark.parametrize("name", PRESETS)
def test_peft_words_pass_through(name: str) -> None:
    config = MoeLoraConfig.from_preset(
        name,
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["layers.0.mlp.up_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        bias="all",
        task_type="CAUSAL_LM",
        trainable_token_indices=[3],
        base_model_name_or_path="some/base",
        revision="main",
        inference_mode=True,
    )
    assert config.target_modules == {"q_proj", "up_proj"}
    assert config.exclude_modules == {"layers.0.mlp.up_proj"}
    assert config.layers_to_transform == [0, 1]
    assert config.layers_pattern == "layers"
    assert config.modules_to_save == ["lm_head"]
    assert config.bias == "all"
    assert config.task_type == "CAUSAL_LM"
    assert config.trainable_token_indices == [3]
    assert config.base_model_name_or_path == "some/base"
    assert config.revision == "main"
    assert config.inference_mode


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("mixlorra", {}, r"unknown preset 'mixlorra'; allowed: mixlora, .*Did you mean 'mixlora'"),
        ("mixlora", {"num_expert": 4}, r"unknown key 'num_expert' in preset 'mixlora'.*Did you mean 'num_experts'"),
        ("mixlora", {"experts": {}}, r"unknown key 'experts' in preset 'mixlora'"),
        ("lora", {"top_k": 1}, r"unknown key 'top_k' in preset 'lora'. Allowed: .*lora_alpha"),
        ("smora", {"num_experts": 4}, r"unknown key 'num_experts' in preset 'smora'"),
        ("mixlora", {"top_k": 9}, r"top_k is 9; allowed: 1 to num_experts \(8\)"),
        ("smora", {"r": 4}, r"top_k is 8; allowed: 1 to num_experts \(4\)"),
        ("sira", {"balance_loss": "x"}, "balance.loss is 'x'"),
    ],
)
def test_unknown_words_are_refused(name: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig.from_preset(name, **words)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_only_a_point_on_the_axes(name: str) -> None:
    config = MoeLoraConfig.from_preset(name)
    parts = {axis: getattr(config, axis) for axis in ("experts", "placement", "routing", "balance", "compute")}
    assert MoeLoraConfig(**parts, preset=name) == config
    doc = inspect.getdoc(getattr(presets, name))
    assert doc is not None
    assert "arXiv" in doc or name == "random_router"
