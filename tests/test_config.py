"""MoeLoraConfig: the round trip through adapter_config.json, what is refused, and the parameter count."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import PeftConfig, PeftModel, get_peft_model

from moelora import (
    BalanceConfig,
    ComputeConfig,
    ExpertsConfig,
    MoeLoraConfig,
    PlacementConfig,
    RoutingConfig,
)
from moelora.errors import ConfigError, FormatVersionError, MoeLoraError
from moelora.version import FORMAT_VERSION, __version__
from tests.adapters import PRESETS, adapted, small_config, snapshot, tuner_layers
from tests.conftest import MODEL_NAMES, tiny_model

EVERYTHING: dict[str, Any] = {
    "target_modules": ["q_proj", "up_proj", "down_proj", "gate_proj"],
    "exclude_modules": ["layers.0.self_attn.q_proj"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "trainable_token_indices": {"embed_tokens": [3, 4]},
    "experts": ExpertsConfig(
        num_experts=5, r=3, lora_alpha=7.5, lora_dropout=0.1, use_rslora=True, init="normal", init_std=0.3
    ),
    "placement": PlacementConfig(feed_forward=True, unrouted_modules=["q_proj"]),
    "routing": RoutingConfig(
        score="sigmoid",
        top_k=3,
        renormalize=False,
        init_std=None,
        expert_dropout=0.25,
        capacity_factor=1.5,
        capacity_in_eval=True,
        bias_update_rate=1e-4,
    ),
    "balance": BalanceConfig(loss="mixtral", coef=0.5, z_loss_coef=0.25, scope="micro_batch"),
    "compute": ComputeConfig(implementation="reference"),
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/base",
    "revision": "abc",
}


def write(config: MoeLoraConfig, folder: Path, edit: dict[str, Any]) -> Path:
    """Save a configuration and edit its file; a dotted key reaches into a nested part."""
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    for key, value in edit.items():
        *parents, last = key.split(".")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("preset", [*PRESETS, "everything"])
def test_round_trip_through_the_file_is_lossless(preset: str, tmp_path: Path) -> None:
    config = MoeLoraConfig(**EVERYTHING) if preset == "everything" else small_config(preset)
    config.save_pretrained(str(tmp_path))
    for loaded in (PeftConfig.from_pretrained(str(tmp_path)), MoeLoraConfig.from_pretrained(str(tmp_path))):
        assert isinstance(loaded, MoeLoraConfig)
        assert loaded == config
        assert loaded.to_dict() == config.to_dict()
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "MOELORA"
    assert content["preset"] == (None if preset == "everything" else preset)
    assert (content["moelora_version"], content["format_version"]) == (__version__, FORMAT_VERSION)


def test_everything_of_the_round_trip_differs_from_its_default() -> None:
    default, given = MoeLoraConfig().to_dict(), MoeLoraConfig(**EVERYTHING).to_dict()
    for name in EVERYTHING:
        if name in ("experts", "placement", "routing", "balance", "compute"):
            same = {key for key, value in default[name].items() if given[name][key] == value}
            assert same == ({"trainable"} if name == "routing" else set())  # a frozen router is random_router's
        else:
            assert given[name] != default[name], name


@pytest.mark.parametrize("preset", PRESETS)
def test_copies_are_equal_and_independent(preset: str) -> None:
    config = small_config(preset)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other.peft_type == config.peft_type
        assert type(other.peft_type) is type(config.peft_type)
        other.experts.num_experts += 1
        assert other != config


def test_parts_may_be_given_as_dicts() -> None:
    config = MoeLoraConfig(experts={"num_experts": 3}, routing={"top_k": 3})  # type: ignore[arg-type]
    assert config.experts == ExpertsConfig(num_experts=3)
    assert config.routing == RoutingConfig(top_k=3)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ({"num_expert": 4}, ["unknown key 'num_expert' in MoeLoraConfig", "Allowed: auto_mapping, balance"]),
        ({"target_module": "x"}, ["Did you mean 'target_modules'?"]),
        ({"experts": {"num_expert": 4}}, ["in experts (ExpertsConfig)", "Did you mean 'num_experts'"]),
        ({"routing": {"topk": 4}}, ["in routing (RoutingConfig)", "Did you mean 'top_k'"]),
        ({"balance": {"coeff": 4}}, ["in balance (BalanceConfig)", "Did you mean 'coef'"]),
        ({"placement": {"feedforward": True}}, ["Did you mean 'feed_forward'"]),
        ({"compute": {"impl": "fast"}}, ["in compute (ComputeConfig)", "Allowed: implementation"]),
        ({"experts": 4}, ["experts is 4; allowed: a ExpertsConfig or a dict of its fields"]),
        ({"experts": None}, ["experts is None"]),
    ],
)
def test_unknown_keys_are_refused(words: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig(**words)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize("key", ["top_q", "experts.num_expert", "routing.jitter", "balance.coeff"])
def test_unknown_keys_of_a_file_are_refused(key: str, tmp_path: Path) -> None:
    model = adapted("mixlora")
    model.save_pretrained(str(tmp_path))
    write(model.peft_config["default"], tmp_path, {key: 1})
    base = tiny_model()
    before = snapshot(base)
    last = key.rpartition(".")[-1]
    for load in (
        lambda: PeftConfig.from_pretrained(str(tmp_path)),
        lambda: MoeLoraConfig.from_pretrained(str(tmp_path)),
        lambda: PeftModel.from_pretrained(base, str(tmp_path)),
        lambda: base.load_adapter(str(tmp_path)),
    ):
        with pytest.raises(ConfigError, match=last):
            load()
    assert snapshot(base) == before


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, "2", None, 1.5, 0])
def test_other_formats_are_refused(version: object, tmp_path: Path) -> None:
    # a newer format has keys that this version does not know; the format is what to complain about
    edit = {"format_version": version, "moelora_version": "9.9.9", "new_key": 1, "experts.new_key": 1}
    write(small_config("mixlora"), tmp_path, edit)
    with pytest.raises(FormatVersionError, match=r"written by moelora 9\.9\.9.*pip install -U moelora"):
        PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"experts": {"num_experts": 0}}, "num_experts is 0; allowed: an integer of at least 1"),
        ({"experts": {"num_experts": True}}, "num_experts is True"),
        ({"experts": {"r": 2.0}}, r"r is 2\.0; allowed: an integer"),
        ({"experts": {"lora_alpha": float("nan")}}, "lora_alpha is nan"),
        ({"experts": {"lora_alpha": "16"}}, "lora_alpha is '16'"),
        ({"experts": {"lora_dropout": 1.0}}, r"lora_dropout is 1\.0; allowed: 0 <= lora_dropout < 1"),
        ({"experts": {"use_rslora": "no"}}, "use_rslora is 'no'; allowed: True, False"),
        ({"experts": {"init": "zeros"}}, "init is 'zeros'; allowed: 'kaiming', 'normal'"),
        ({"experts": {"init_std": 0}}, "init_std is 0"),
        ({"placement": {"feed_forward": 1}}, "feed_forward is 1; allowed: True, False"),
        ({"placement": {"unrouted_modules": "rest"}}, "'rest' only together with feed_forward=True"),
        ({"placement": {"unrouted_modules": 3}}, "unrouted_modules is 3"),
        ({"placement": {"unrouted_modules": "("}}, r"unrouted_modules is '\('; .*regular expression"),
        ({"routing": {"score": "cosine"}}, "score is 'cosine'; allowed: 'softmax', 'sigmoid'"),
        ({"routing": {"top_k": 0}}, "top_k is 0; allowed: an integer of at least 1, or None"),
        ({"routing": {"top_k": 9}}, r"top_k is 9; allowed: 1 to num_experts \(8\).*raise num_experts"),
        ({"routing": {"renormalize": None}}, "renormalize is None; allowed: True, False"),
        ({"routing": {"trainable": "yes"}}, "trainable is 'yes'; allowed: True, False"),
        ({"routing": {"init_std": -1}}, "init_std is -1"),
        ({"routing": {"expert_dropout": 1}}, "expert_dropout is 1"),
        ({"routing": {"capacity_factor": 0}}, "capacity_factor is 0"),
        ({"routing": {"top_k": None, "capacity_factor": 1.0}}, "None with dense routing"),
        ({"routing": {"capacity_in_eval": True}}, "capacity_in_eval is True; allowed: False without a capacity"),
        ({"routing": {"bias_update_rate": -1.0}}, r"bias_update_rate is -1\.0"),
        ({"routing": {"bias_update_rate": 1e-3}}, "0 unless routing is sigmoid top-k"),
        ({"routing": {"bias_update_rate": 1e-3, "score": "sigmoid", "top_k": None}}, "0 unless routing is sigmoid"),
        ({"balance": {"loss": "gshard"}}, "loss is 'gshard'; allowed: 'switch', 'mixtral'"),
        ({"balance": {"coef": -0.1}}, r"coef is -0\.1"),
        ({"balance": {"z_loss_coef": None}}, "z_loss_coef is None"),
        ({"balance": {"scope": "batch"}}, "scope is 'batch'; allowed: 'global', 'micro_batch'"),
        ({"balance": {"coef": 0.1}, "routing": {"trainable": False}}, "router.*not trained|not trained.*router"),
        ({"compute": {"implementation": "cuda"}}, "implementation is 'cuda'; allowed: 'fast', 'compiled', 'reference'"),
        ({"target_modules": []}, "target_modules is .*would adapt nothing"),
        ({"target_modules": None}, "target_modules is None; allowed: name endings, a regex, or 'all-linear'"),
        ({"target_modules": "("}, r"target_modules is '\('; .*regular expression"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"exclude_modules": "["}, r"exclude_modules is '\['; .*regular expression"),
        ({"target_modules": r".*\.q_proj", "layers_to_transform": [0]}, "layer numbers into the regex"),
        ({"target_modules": r".*\.q_proj", "layers_pattern": "h"}, "layer numbers into the regex"),
        ({"layers_pattern": "layers"}, "None without layers_to_transform"),
        ({"layers_to_transform": []}, r"layers_to_transform is \[\]"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform is \[-1\]"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; allowed: a list of names"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; allowed: 'none', 'all', 'moelora_only'"),
        ({"task_type": "CLASSIFY"}, "CLASSIFY"),
        ({"peft_type": "LORA"}, "peft_type is 'LORA'; allowed: 'MOELORA'"),
    ],
)
def test_values_out_of_range_and_contradictions_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(**words)


def test_every_error_is_a_value_error() -> None:
    assert issubclass(MoeLoraError, ValueError)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 32 / 16), (True, 32 / 4)])
def test_scaling(rslora: bool, scaling: float) -> None:
    config = MoeLoraConfig(experts=ExpertsConfig(r=16, lora_alpha=32, use_rslora=rslora))
    assert config.scaling == config.experts.scaling == scaling


COUNTED_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer": {"layers_to_transform": [1]},
    "saved": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 4, 5]},
    "tokens_by_name": {"trainable_token_indices": {"embed_tokens": [3, 4]}},
    "bias_all": {"bias": "all"},
    "bias_only": {"bias": "moelora_only"},
    "excluded": {"exclude_modules": ["down_proj", "q_proj"]},
    "excluded_by_regex": {"exclude_modules": r".*layers\.0.*"},
    "some_of_the_block": {"target_modules": ["up_proj", "v_proj"]},
    "only_the_block": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "regex": {"target_modules": r".*\.(up_proj|o_proj)"},
    "rslora_like_names": {"target_modules": ["layers.1.mlp.up_proj", "layers.0.mlp.down_proj"]},
}


def trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_count_equals_the_real_one(preset: str, name: str) -> None:
    base, config = tiny_model(name), small_config(preset, name)
    before = snapshot(base)
    count = config.num_trainable_parameters(base)
    assert snapshot(base) == before
    assert config == small_config(preset, name)
    assert count == trainable(get_peft_model(base, config))


@pytest.mark.parametrize("option", COUNTED_OPTIONS)
@pytest.mark.parametrize("preset", ["mixlora", "smora"])
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_count_equals_the_real_one_with_options(option: str, preset: str, name: str) -> None:
    config = small_config(preset, name, **COUNTED_OPTIONS[option])
    base = tiny_model(name)
    assert config.num_trainable_parameters(base) == trainable(get_peft_model(base, config))


@pytest.mark.parametrize("bias", ["none", "all", "moelora_only"])
@pytest.mark.parametrize("preset", ["mixlora", "smora"])
def test_count_with_the_biases_of_a_plain_block(bias: str, preset: str) -> None:
    config = small_config(preset, "phi", bias=bias, modules_to_save=["lm_head"])
    base = tiny_model("phi")
    assert config.num_trainable_parameters(base) == trainable(get_peft_model(base, config))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("bias", ["all", "moelora_only"])
@pytest.mark.parametrize("preset", ["sira", "mixlora"])
def test_count_with_a_classification_head(preset: str, bias: str, task: str) -> None:
    config = small_config(preset, "bert", task_type=task, bias=bias, modules_to_save=["pooler"])
    base = tiny_model("bert")
    assert config.num_trainable_parameters(base) == trainable(get_peft_model(base, config))


@pytest.mark.parametrize(
    ("task", "head"), [("TOKEN_CLS", "BertForTokenClassification"), ("QUESTION_ANS", "BertForQuestionAnswering")]
)
def test_heads_of_other_tasks_are_trained_whole_and_not_adapted(task: str, head: str) -> None:
    base = getattr(transformers, head)(tiny_model("bert").config)
    config = small_config("sira", "bert", task_type=task)
    count = config.num_trainable_parameters(base)
    model = get_peft_model(base, config)
    assert count == trainable(model)
    assert not {"classifier", "qa_outputs"} & set(tuner_layers(model))
    assert any("modules_to_save" in name and p.requires_grad for name, p in model.named_parameters())


def test_count_of_a_second_adapter() -> None:
    model = adapted("mixlora")
    config = small_config("mixlora", num_experts=6, r=2)
    alone = config.num_trainable_parameters(tiny_model())
    assert config.num_trainable_parameters(model.get_base_model()) == alone
    assert config.num_trainable_parameters(model) == alone
