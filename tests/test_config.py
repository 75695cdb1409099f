"""MoeLoraConfig: the round trip through adapter_config.json, what is refused, and the parameter count."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import PeftConfig, PeftModel, get_peft_model

from moelora import MoeLoraConfig
from moelora.balance.bias_update import BiasUpdate
from moelora.balance.mixtral import MixtralBalance
from moelora.balance.z_loss import ZLoss
from moelora.choices import AXES
from moelora.errors import ConfigError, FormatVersionError, MoeLoraError
from moelora.experts.lora import LoraExperts
from moelora.inject.placement import FeedForwardPlacement
from moelora.ops.compute import Reference
from moelora.scores.linear import LinearScores
from moelora.selection.top_k import TopK
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
    "experts": LoraExperts(
        num_experts=5, r=3, lora_alpha=7.5, lora_dropout=0.1, use_rslora=True, init="normal", init_std=0.3, num_frozen=2
    ),
    "placement": FeedForwardPlacement(unrouted_modules=["q_proj"]),
    "scores": LinearScores(activation="sigmoid", init_std=None, bias=True, jitter=0.1, noise=True, bias_weighs=False),
    "selection": TopK(
        k=3, renormalize=False, expert_dropout=0.25, capacity_factor=1.5, capacity_in_eval=True, multiply_by_gate=False
    ),
    "balance": [MixtralBalance(coef=0.5), ZLoss(coef=0.25), BiasUpdate(coef=1e-4)],
    "balance_scope": "micro_batch",
    "compute": Reference(),
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
            part = part[int(parent) if parent.isdigit() else parent]
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
        if name in AXES and name != "balance":
            same = {key for key, value in default[name].items() if given[name][key] == value}
            kind = set() if name in ("placement", "compute") else {"kind"}
            # scores of the layers' inputs have a router at each site, and a bias that moves has no frozen rows
            kept = {
                "scores": {"trainable", "num_frozen"},
                "placement": {"routers"},
                "experts": {"per_layer"},
                # there is a factor already; weights are not renormalised; a bias counts choices
                "selection": {"capacity", "straight_through", "dense_in_training"},
            }
            assert same == kind | kept.get(name, set())
        else:
            assert given[name] != default[name], name


def test_the_file_names_every_axis(tmp_path: Path) -> None:
    MoeLoraConfig().save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["balance"] == []
    for axis in set(AXES) - {"balance"}:
        assert content[axis]["kind"] == getattr(MoeLoraConfig(), axis).kind


@pytest.mark.parametrize("preset", PRESETS)
def test_copies_are_equal_and_independent(preset: str) -> None:
    config = small_config(preset)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other.peft_type == config.peft_type
        assert type(other.peft_type) is type(config.peft_type)
        other.experts = dataclasses.replace(other.experts, num_experts=other.experts.num_experts + 1)
        assert other != config
        other = copy.deepcopy(config)
        other.balance.append(ZLoss(coef=0.3))
        assert other != config


def test_an_axis_may_be_given_as_a_kind_a_dict_or_a_choice() -> None:
    config = MoeLoraConfig(
        experts={"kind": "lora", "num_experts": 3},
        selection={"kind": "top_k", "k": 3},
        balance="z",
        compute=Reference(),
    )
    assert config.experts == LoraExperts(num_experts=3)
    assert config.selection == TopK(k=3)
    assert config.balance == [ZLoss()]
    assert config.compute == Reference()
    assert config == MoeLoraConfig(
        experts=LoraExperts(num_experts=3), selection=TopK(k=3), balance=[{"kind": "z"}], compute="reference"
    )


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ({"num_expert": 4}, ["unknown key 'num_expert' in MoeLoraConfig", "Allowed: auto_mapping, balance"]),
        ({"routing": {"top_k": 2}}, ["unknown key 'routing' in MoeLoraConfig"]),
        ({"target_module": "x"}, ["Did you mean 'target_modules'?"]),
        ({"experts": {"kind": "lora", "num_expert": 4}}, ["in experts 'lora'", "Did you mean 'num_experts'"]),
        ({"selection": {"kind": "top_k", "top_k": 4}}, ["in selection 'top_k'", "Allowed: capacity, capacity_factor"]),
        ({"scores": {"kind": "linear", "activations": 4}}, ["in scores 'linear'", "Did you mean 'activation'"]),
        ({"balance": {"kind": "switch", "coeff": 4}}, ["in balance 'switch'", "Did you mean 'coef'"]),
        ({"placement": {"kind": "linear", "unrouted_module": "x"}}, ["Did you mean 'unrouted_modules'"]),
        ({"compute": {"kind": "fast", "impl": 1}}, ["unknown key 'impl' in compute 'fast'"]),
        (
            {"experts": 4},
            [
                "experts is 4; allowed: a kind (",
                "'num_experts'",
            ],
        ),
        ({"experts": None}, ["experts is None"]),
        ({"selection": {"k": 2}}, ["selection is {'k': 2}; allowed: a kind"]),
        ({"selection": "topk"}, ["selection is 'topk'; allowed: a kind"]),
        ({"balance": ["switch", "gshard"]}, ["balance is 'gshard'; allowed: a kind"]),
    ],
)
def test_unknown_keys_are_refused(words: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig(**words)
    for message in messages:
        assert message in str(error.value)


def refused_by_every_loader(folder: Path, match: str) -> None:
    base = tiny_model()
    before = snapshot(base)
    for load in (
        lambda: PeftConfig.from_pretrained(str(folder)),
        lambda: MoeLoraConfig.from_pretrained(str(folder)),
        lambda: PeftModel.from_pretrained(base, str(folder)),
        lambda: base.load_adapter(str(folder)),
    ):
        with pytest.raises(ConfigError, match=match):
            load()
    assert snapshot(base) == before


@pytest.mark.parametrize("key", ["top_q", "experts.num_expert", "selection.jitter", "scores.jitter", "balance.0.coeff"])
def test_unknown_keys_of_a_file_are_refused(key: str, tmp_path: Path) -> None:
    model = adapted("mixlora")
    model.save_pretrained(str(tmp_path))
    write(model.peft_config["default"], tmp_path, {key: 1})
    refused_by_every_loader(tmp_path, key.rpartition(".")[-1])


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "compute"])
def test_a_file_that_lacks_an_axis_is_refused(axis: str, tmp_path: Path) -> None:
    """Its default would be another adapter than the one that was saved. How it is computed shapes nothing."""
    model = adapted("mixlora")
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    del content[axis]
    path.write_text(json.dumps(content))
    refused_by_every_loader(tmp_path, rf"\(format version {FORMAT_VERSION}\) lacks {axis}; allowed: all of experts")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, "2", None, 1.5, 0])
def test_other_formats_are_refused(version: object, tmp_path: Path) -> None:
    # a newer format has keys that this version does not know; the format is what to complain about
    edit = {"format_version": version, "moelora_version": "9.9.9", "new_key": 1, "experts.new_key": 1}
    write(small_config("mixlora"), tmp_path, edit)
    with pytest.raises(FormatVersionError, match=r"written by moelora 9\.9\.9.*at least as new"):
        PeftConfig.from_pretrained(str(tmp_path))


def of(axis: str, kind: str, **fields: Any) -> dict[str, Any]:
    """A word of the configuration: one axis."""
    return {axis: {"kind": kind, **fields}}


BIASED = {"kind": "linear", "bias": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (of("experts", "lora", num_experts=0), "num_experts is 0; allowed: an integer of at least 1"),
        (of("experts", "lora", num_experts=True), "num_experts is True"),
        (of("experts", "lora", r=2.0), r"r is 2\.0; allowed: an integer"),
        (of("experts", "lora", lora_alpha=float("nan")), "lora_alpha is nan"),
        (of("experts", "lora", lora_alpha="16"), "lora_alpha is '16'"),
        (of("experts", "lora", lora_dropout=1.0), r"lora_dropout is 1\.0; allowed: 0 <= lora_dropout < 1"),
        (of("experts", "lora", use_rslora="no"), "use_rslora is 'no'; allowed: True, False"),
        (of("experts", "lora", init="zeros"), "init is 'zeros'; allowed: 'kaiming', 'normal'"),
        (of("experts", "lora", init_std=0), "init_std is 0"),
        (of("experts", "lora_shared_a", r=0), "r is 0; allowed: an integer of at least 1"),
        (of("placement", "linear", unrouted_modules="rest"), "'rest' only with the placement 'feed_forward'"),
        (of("placement", "linear", unrouted_modules=3), "unrouted_modules is 3"),
        (of("placement", "linear", unrouted_modules="("), r"unrouted_modules is '\('; .*regular expression"),
        (of("scores", "linear", activation="cosine"), "activation is 'cosine'; allowed: 'softmax', 'sigmoid'"),
        (of("scores", "linear", trainable="yes"), "trainable is 'yes'; allowed: True, False"),
        (of("scores", "linear", init_std=-1), "init_std is -1"),
        (of("scores", "linear", bias=1), "bias is 1; allowed: True, False"),
        (of("selection", "top_k", k=0), "top_k is 0; allowed: an integer of at least 1"),
        (of("selection", "top_k", k=None), "top_k is None; allowed: an integer of at least 1"),
        (of("selection", "top_k", k=9), r"top_k is 9; allowed: 1 to num_experts \(8\).*raise num_experts"),
        (
            of("selection", "top_k", k=1),
            "top_k is 1 with renormalize=True: .* gives the router no gradient|no gradient",
        ),
        (of("selection", "top_k", renormalize=None), "renormalize is None; allowed: True, False"),
        (of("selection", "dense", renormalize=None), "renormalize is None; allowed: True, False"),
        (of("selection", "top_k", expert_dropout=1), "expert_dropout is 1"),
        (of("selection", "top_k", capacity_factor=0), "capacity_factor is 0"),
        (of("selection", "dense", capacity_factor=1.0), "unknown key 'capacity_factor' in selection 'dense'"),
        (
            of("selection", "top_k", capacity_in_eval=True),
            "capacity_in_eval is True; allowed: False without a capacity",
        ),
        (of("selection", "learned_threshold", max_threshold=0), "max_threshold is 0; allowed: 0 < max_threshold <= 1"),
        (of("selection", "learned_threshold", max_threshold=1.5), r"max_threshold is 1\.5"),
        (of("balance", "bias_update", coef=-1.0), r"bias_update_rate is -1\.0"),
        (of("balance", "bias_update", coef=1e-3), "a bias that 'linear' scores do not have"),
        ({"scores": BIASED, "selection": "dense", **of("balance", "bias_update", coef=1e-3)}, "counts choices"),
        (of("balance", "gshard"), "balance is {'kind': 'gshard'}; allowed: a kind .*'switch'"),
        (of("balance", "switch", coef=-0.1), r"coef is -0\.1"),
        (of("balance", "switch", coef=float("inf")), "coef is inf"),
        (of("balance", "z", coef=None), "z_loss_coef is None"),
        (of("balance", "threshold", coef=0.1), "'threshold' needs a threshold"),
        ({"balance_scope": "batch"}, "balance_scope is 'batch'; allowed: 'global', 'micro_batch'"),
        (
            {**of("balance", "switch", coef=0.1), **of("scores", "linear", trainable=False)},
            "router.*not trained|not trained.*router",
        ),
        (of("compute", "cuda"), "compute is {'kind': 'cuda'}; allowed: a kind .*'fast', 'compiled', 'reference'"),
        ({"target_modules": []}, "target_modules is .*would adapt nothing"),
        ({"target_modules": None}, "target_modules is None; allowed: name endings, a regex, or 'all-linear'"),
        ({"target_modules": "("}, r"target_modules is '\('; .*regular expression"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"exclude_modules": "["}, r"exclude_modules is '\['; .*regular expression"),
        ({"target_modules": r".*\.q_proj", "layers_to_transform": [0]}, "layer numbers into the regex"),
        ({"target_modules": r".*\.q_proj", "layers_pattern": "h"}, "None without layers_to_transform"),
        ({"layers_to_transform": [1]}, r"None when target_modules is a regex or 'all-linear' \(it is 'all-linear'\)"),
        ({"layers_pattern": "layers"}, "None without layers_to_transform"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "None without layers_to_transform"),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, r"layers_to_transform is \[\]"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [-1]}, r"layers_to_transform is \[-1\]"),
        ({"target_modules": ["q_proj"], "layers_to_transform": "0"}, "layers_to_transform is '0'"),
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
    config = MoeLoraConfig(experts=LoraExperts(r=16, lora_alpha=32, use_rslora=rslora))
    assert config.scaling == config.experts.scaling == scaling


COUNTED_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer": {"target_modules": ["q_proj", "gate_proj", "up_proj"], "layers_to_transform": [1]},
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
