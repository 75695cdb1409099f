"""Presets: their defaults, their words, and that none is a code path of its own."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import moelora
from moelora import MoeLoraConfig, presets
from moelora.balance.mixtral import MixtralBalance
from moelora.balance.z_loss import ZLoss
from moelora.choices import AXES, kinds
from moelora.errors import ConfigError
from moelora.ops.compute import Fast, Reference
from moelora.selection.top_k import TopK
from tests.adapters import FAMILY, PRESETS
from tests.presets.defaults import DEFAULTS

# The kind of the load-balancing loss where it is not "switch".
LOSSES = {
    "loramoe": "localized",
    "adamole": "threshold",
    "mixlora_dynamic": "mixtral",
    "perft_r": "mixtral",
    "smore": "tree_switch",
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
    "compute",
    "balance_scope",
}


def test_available() -> None:
    assert set(moelora.presets.available()) == set(DEFAULTS) == set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_defaults(name: str) -> None:
    config = MoeLoraConfig.from_preset(name)
    assert {axis: getattr(config, axis) for axis in DEFAULTS[name]} == DEFAULTS[name]
    assert config.preset == name
    assert config.target_modules == "all-linear"
    assert config.compute == Fast()
    assert config.balance_scope == "global"
    assert config == getattr(presets, name)()


@pytest.mark.parametrize("name", FAMILY)
def test_words(name: str) -> None:
    words = presets.words(name)
    assert len(words) == len(set(words))
    assert set(words) >= (LORA_WORDS if name in PRESETS else set()) | PEFT_WORDS
    fixed = {"preset", "format_version", "moelora_version", "peft_type", *AXES} - {"compute"}
    assert not set(words) & fixed


# A value for each word that differs from every default, and where it ends up: a field of an axis, or a kind of balance.
OWN_WORDS: dict[str, tuple[Any, str]] = {
    "lora_alpha": (7.0, "experts.lora_alpha"),
    "lora_dropout": (0.3, "experts.lora_dropout"),
    "use_rslora": (True, "experts.use_rslora"),
    "num_experts": (5, "experts.num_experts"),
    "top_k": (3, "selection.k"),
    "top_p": (0.5, "selection.p"),
    "capacity": (7, "selection.capacity"),
    "routers": ("per_input", "placement.routers"),
    "multiply_by_gate": (True, "selection.multiply_by_gate"),
    "threshold": (0.3, "selection.threshold"),
    "num_tasks": (5, "scores.num_tasks"),
    "task_features": (7, "scores.features"),
    "router_jitter": (0.2, "scores.jitter"),
    "renormalize": (True, "selection.renormalize"),
    "router_init_std": (0.7, "scores.init_std"),
    "expert_dropout": (0.2, "selection.expert_dropout"),
    "capacity_factor": (3.0, "selection.capacity_factor"),
    "capacity_in_eval": (True, "selection.capacity_in_eval"),
    "fan_out": ([1, 3], "selection.fan_out"),
    "activation": ("relu", "experts.activation"),
    "position": ("child", "experts.position"),
    "key_features": (7, "scores.features"),
    "noise": (True, "scores.noise"),
    "slots": (2, "experts.slots"),
    "ends": (4, "experts.ends"),
    "gradient_mask": (0.5, "experts.gradient_mask"),
    "rounds": (4, "experts.rounds"),
    "state_features": (9, "experts.features"),
    "gate_size": (9, "scores.size"),
    "gate_depth": (3, "scores.depth"),
    "gate_dropout": (0.3, "scores.dropout"),
    "per": ("token", "scores.per"),
    "frozen_adapters": (1, "experts.num_frozen"),
    "num_adapters": (3, "experts.num_experts"),
    "bottleneck": (9, "experts.bottleneck"),
    "reduction": (7, "experts.reduction"),
    "summands": (2, "experts.summands"),
    "rank": (3, "experts.rank"),
    "scale": (0.5, "experts.scale"),
    "num_centroids": (5, "scores.num_centroids"),
    "embedding": ("hidden", "scores.embedding"),
    "embedding_features": (9, "scores.features"),
    "equivalent_rank": (3, "experts.equivalent_rank"),
    "shards": (2, "experts.shards"),
    "private": (0, "experts.private"),
    "seed": (7, "experts.seed"),
    "max_threshold": (0.3, "selection.max_threshold"),
    "bias_update_rate": (0.1, "balance.bias_update"),
    "balance_coef": (0.7, "balance.switch"),
    "z_loss_coef": (0.3, "balance.z"),
    "consistency_coef": (0.7, "balance.consistency"),
}


def with_field(config: MoeLoraConfig, path: str, value: Any) -> dict[str, Any]:
    """The axes of a configuration with one field changed."""
    found = {axis: getattr(config, axis) for axis in AXES}
    axis, field = path.split(".")
    if axis != "balance":
        found[axis] = dataclasses.replace(found[axis], **{field: value})
        return found
    choices = {choice.kind: choice for choice in found["balance"]}
    come_together = config.preset not in ("smore", "loramoe")
    if field not in ("bias_update", "consistency") and come_together:
        losses = {field, "z"} if field != "z" else {"z", LOSSES.get(config.preset or "", "switch")}
        choices |= {kind: kinds("balance")[kind]() for kind in losses - set(choices)}
    choices[field] = dataclasses.replace(choices[field], coef=value)
    found["balance"] = sorted(choices.values(), key=lambda choice: choice.kind)
    return found


def axes(config: MoeLoraConfig) -> dict[str, Any]:
    """The axes of a configuration, balance in the order of its kinds."""
    return {axis: getattr(config, axis) for axis in AXES} | {"balance": sorted(config.balance, key=lambda c: c.kind)}


# Words that are more than one field; tests of the presets themselves say what they do.
SEVERAL_FIELDS = {
    ("loramoe", "delta"),
    ("loramoe", "first_tasks"),
    ("loramoe", "z_loss_coef"),
    ("mola", "num_experts"),
    ("smore", "noise"),
    ("moelora_task", "lora_alpha"),
    ("moelora_task", "num_experts"),
    ("poly", "num_splits"),
    ("mhr", "num_splits"),
    ("mhr", "num_experts"),
}


@pytest.mark.parametrize("name", FAMILY)
def test_every_word_of_a_preset_reaches_its_field(name: str) -> None:
    own = inspect.signature(getattr(presets, name)).parameters
    for word in own:
        plain = ("r", "peft_words", "balance_loss", "rows", "columns", "diagonal", "sizes")
        if word in plain or (name, word) in SEVERAL_FIELDS:
            continue
        value, path = OWN_WORDS[word]
        if (name, word) == ("smore", "lora_alpha"):
            path = "experts.alpha"
        if word == "balance_coef":
            path = f"balance.{LOSSES.get(name, 'switch')}"
        if (name, word) in (("perft_d", "num_experts"), ("soft_moa", "slots"), ("mixda", "num_adapters")):
            continue  # it says the number of weights, or of experts, as well
        # MoLA's lowest layers have two experts
        others = {"num_experts": 4} if (name, word) == ("mola", "top_k") else {}
        before, config = (MoeLoraConfig.from_preset(name, **words) for words in (others, {**others, word: value}))
        assert axes(config) == with_field(before, path, value), f"{word} is more than {path}"
        assert axes(config) != axes(before) or word == "renormalize"


@pytest.mark.parametrize("name", ["mixlora", "sira"])
def test_the_word_balance_loss_names_the_kind_of_the_loss(name: str) -> None:
    config = MoeLoraConfig.from_preset(name, balance_loss="mixtral", balance_coef=0.7)
    assert config.balance == [MixtralBalance(coef=0.7), ZLoss()]
    assert axes(config) | {"balance": []} == axes(MoeLoraConfig.from_preset(name)) | {"balance": []}


@pytest.mark.filterwarnings("ignore:compute is 'reference'")
@pytest.mark.parametrize("name", FAMILY)
def test_every_preset_takes_the_words_of_balance_scope_and_compute(name: str) -> None:
    config = MoeLoraConfig.from_preset(name, balance_scope="micro_batch", compute="reference")
    assert config.balance_scope == "micro_batch"
    assert config.compute == Reference()
    assert MoeLoraConfig.from_preset(name, compute={"implementation": "reference"}).compute == Reference()


@pytest.mark.filterwarnings("error:compute is")
def test_a_form_that_a_method_does_not_have_is_said() -> None:
    for name in ("mixlora", "mixlora_switch", "random_router"):
        MoeLoraConfig.from_preset(name, compute="compiled")
    for name in ("mixlora", "sira", "mos", "mixdora"):
        MoeLoraConfig.from_preset(name, compute="reference")
    with pytest.warns(UserWarning, match="compute is 'compiled', and a mixture with placement 'linear' has no.*'fast'"):
        MoeLoraConfig.from_preset("sira", compute="compiled")
    with pytest.warns(UserWarning, match="compute is 'reference', and 'vector' experts have one form.*runs as 'fast'"):
        MoeLoraConfig.from_preset("mov", compute="reference")


@pytest.mark.parametrize("name", FAMILY)
def test_a_coefficient_of_zero_leaves_the_choice_out(name: str) -> None:
    words = [word for word in presets.words(name) if word.endswith("_coef") or word == "bias_update_rate"]
    # without a gate nothing but the loss trains the router
    gate: dict[str, Any] = {"multiply_by_gate": True} if name == "llava_mole" else {}
    config = MoeLoraConfig.from_preset(name, **gate, **dict.fromkeys(words, 0.0))
    assert config.balance == []
    assert not config.has_balance_loss
    assert not getattr(config.scores, "bias", False)


def test_top_1_is_weighted_by_the_raw_score() -> None:
    """A renormalised weight of one choice is 1 whatever the router says."""
    assert MoeLoraConfig.from_preset("mixlora", top_k=1).selection == TopK(k=1, renormalize=False)
    assert MoeLoraConfig.from_preset("mixlora", top_k=1, num_experts=1).selection == TopK(k=1, renormalize=True)
    with pytest.raises(ConfigError, match="gives the router no gradient"):
        MoeLoraConfig.from_preset("mixlora", top_k=1, renormalize=True)
    with pytest.raises(ConfigError, match="gives the router no gradient"):
        MoeLoraConfig.from_preset("smora", top_k=1)
    assert MoeLoraConfig.from_preset("random_router", top_k=1).selection == TopK(k=1)


@pytest.mark.parametrize("name", PRESETS)
def test_r_is_the_rank_of_one_expert_and_the_total_of_single_rank_presets(name: str) -> None:
    experts = MoeLoraConfig.from_preset(name, r=12).experts
    assert (experts.num_experts, experts.r) == ((12, 1) if name == "smora" else (experts.num_experts, 12))


@pytest.mark.parametrize("name", FAMILY)
def test_peft_words_pass_through(name: str) -> None:
    config = MoeLoraConfig.from_preset(
        name,
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["layers.0.mlp.up_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        bias="all",
        task_type=None if name == "soft_moa" else "CAUSAL_LM",
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
    assert config.task_type == (None if name == "soft_moa" else "CAUSAL_LM")
    assert config.trainable_token_indices == [3]
    assert config.base_model_name_or_path == "some/base"
    assert config.revision == "main"
    assert config.inference_mode


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("mixlorra", {}, r"unknown preset 'mixlorra'; allowed: adamole, .*mixlora, .*Did you mean 'mixlora'"),
        ("mixlora", {"num_expert": 4}, r"unknown key 'num_expert' in preset 'mixlora'.*Did you mean 'num_experts'"),
        ("mixlora", {"experts": {"q": 1}}, r"unknown key 'q' in experts 'lora'\."),
        ("lora", {"top_k": 1}, r"unknown key 'top_k' in preset 'lora'\..*lora_alpha"),
        ("smora", {"num_experts": 4}, r"unknown key 'num_experts' in preset 'smora'\."),
        ("mixlora", {"top_k": 9}, r"top_k is 9; allowed: 1 to num_experts \(8\)"),
        ("mixlora_dynamic", {"top_p": 1.5}, r"top_p is 1\.5; allowed: 0 < top_p <= 1"),
        ("mixlora_switch", {"capacity": 0}, r"capacity is 0; allowed: an integer of at least 1, or None"),
        ("adamole", {"top_k": 2}, r"unknown key 'top_k' in preset 'adamole'\."),
        ("adamole", {"max_threshold": 2.0}, r"max_threshold is 2\.0"),
        ("smora", {"r": 4}, r"top_k is 8; allowed: 1 to num_experts \(4\)"),
        ("sira", {"balance_loss": "x"}, "balance is .*'x'.*; allowed: a kind"),
    ],
)
def test_unknown_words_are_refused(name: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig.from_preset(name, **words)


@pytest.mark.parametrize("name", FAMILY)
def test_a_preset_is_only_a_point_on_the_axes(name: str) -> None:
    config = MoeLoraConfig.from_preset(name)
    assert MoeLoraConfig(**{axis: getattr(config, axis) for axis in AXES}, preset=name) == config
    assert MoeLoraConfig(**{axis: config.to_dict()[axis] for axis in AXES}, preset=name) == config
    doc = inspect.getdoc(getattr(presets, name))
    assert doc is not None
    assert "arXiv" in doc or name == "random_router"
