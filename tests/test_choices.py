"""The protocol of a choice: every registered one is read and written without loss, and nothing unknown is accepted."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftConfig
from torch import nn

from moelora import MoeLoraConfig, choices
from moelora.choices import AXES, Choice, Init, Param, kinds, read, register, write
from moelora.errors import ConfigError
from moelora.selection.base import Selection
from moelora.selection.top_k import TopK
from tests.routing.routers import site_of

ALL = [(axis, kind) for axis in AXES for kind in kinds(axis)]
# A value of each field that differs from its default.
OTHER: dict[str, Any] = {
    "num_experts": 5,
    "r": 3,
    "lora_alpha": 7.5,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "init": "normal",
    "init_std": 0.3,
    "unrouted_modules": ["q_proj"],
    "activation": "sigmoid",
    "trainable": False,
    "bias": True,
    "bias_weighs": False,
    "num_null": 2,
    "num_shared": 2,
    "k": 3,
    "renormalize": None,  # the other of two
    "expert_dropout": 0.25,
    "capacity_factor": 1.5,
    "capacity_in_eval": True,
    "max_threshold": 0.2,
    "coef": 0.5,
    "num_frozen": 2,
    "names": ["a", "b", "c", "d", "e"],
    "ranks": [1, 2, 3, 1, 2],
    "sources": [{"source": name} for name in "abcde"],
    "routers": "per_model",
    "weights": [0.5, -1.0],
    "absolute": True,
    "standardize": True,
    "temperature": 0.7,
    "features": 12,
    "embedding": "input",
    "turn_start": [3, 1],
    "threshold": True,
    "alpha": 2.5,
    "depth": 3,
    "size": 6,
    "dropout": 0.1,
    "softmax": False,
    "layerwise": True,
    "per": "sequence",
    "rounds": 4,
    "ends": 3,
    "gradient_mask": 0.5,
    "rows": 2,
    "columns": 3,
    "diagonal": True,
    "reduction": 4,
    "summands": 2,
    "rank": 3,
    "scale": 0.5,
    "num_splits": 2,
    "position": "child",
    "equivalent_rank": 3,
    "shards": 2,
    "private": 0,
    "seed": 7,
    "slots": 5,
    "bottleneck": 6,
    "per_head": False,
    "parts": ["value", "down"],
    "num_centroids": 6,
    "softmax_scale": 3.0,
    "intuition_scale": 2.0,
    "fitted": True,
    "num_tasks": 3,
    "groups": 2,
    "jitter": 0.2,
    "noise": True,
    "raw_single": True,
    "straight_through": True,
    "dense_in_training": True,
    "p": 0.6,
    "sizes": [2, 3],
    "fan_out": [1, 2],
    "capacity": None,  # there is a factor already
    "per_layer": None,  # of one of the layers
    "recipe": {"kind": "uniform"},
    "multiply_by_gate": False,
    "delta": 0.3,
    "first_tasks": [0, 2],
}
# Where a name means something else.
OTHER_OF: dict[str, dict[str, Any]] = {
    "grid": {"num_experts": 3, "rows": 3},
    "poly": {"num_experts": 6},
    "parts": {"unrouted_modules": None},
    "residual_tree": {"num_experts": 9, "activation": "relu"},
    "threshold": {"threshold": 0.3},
    "block": {"unrouted_modules": None},
    "moe_block": {"unrouted_modules": None},
    "intuition": {"embedding": "hidden"},
    "shards": {"num_experts": 1},
    "lora_with_shared": {"num_frozen": 0},
    "lora_ranks": {"num_frozen": 0},
    "top_k": {"straight_through": False, "dense_in_training": False},
}
# Fields that keep their default here: what excludes them is set, or allows one value.
KEPT = {
    "lora": {"per_layer"},
    "lora_composed": {"per_layer"},
    "lora_shared_a": {"per_layer"},
    "dora": {"per_layer"},
    "lora_with_null": {"per_layer"},
    "lora_ranks": {"per_layer", "num_frozen"},
    "lora_with_shared": {"per_layer", "num_frozen"},
    "top_k": {"capacity", "straight_through", "dense_in_training"},
    "block": {"unrouted_modules"},
    "parts": {"unrouted_modules"},
    "moe_block": {"unrouted_modules"},
    "shards": {"num_experts"},
}


def filled(axis: str, kind: str) -> Choice:
    """A choice none of whose fields has its default."""
    cls = kinds(axis)[kind]
    words = {field.name: OTHER[field.name] for field in dataclasses.fields(cls)}
    words |= {name: value for name, value in OTHER_OF.get(kind, {}).items() if name in words and axis != "balance"}
    if "renormalize" in words:
        words["renormalize"] = not cls().renormalize  # type: ignore[attr-defined]
    return cls(**words)


def test_the_kinds() -> None:
    assert {axis: set(kinds(axis)) for axis in AXES} == {
        "experts": {
            *("lora", "lora_shared_a", "lora_composed", "grid", "phm", "poly", "residual_tree", "shards", "slots"),
            *("vector", "dora", "bottleneck", "mpo", "lora_rounds", "lora_with_null", "lora_with_shared", "lora_ranks"),
        },
        "placement": {"linear", "feed_forward", "feed_forward_linears", "block", "parts", "moe_block"},
        "scores": {
            *("linear", "constant", "task", "prototypes", "centroids", "glider", "classifier", "base_router"),
            *("intuition", "task_embedding", "task_table", "tree_keys", "mlp", "cosine"),
        },
        "selection": {
            *("dense", "top_k", "top_p", "threshold", "learned_threshold", "nearest", "draw", "tree_top"),
            *("sparse_mixer", "growing_top_k"),
        },
        "balance": {
            *("switch", "mixtral", "z", "threshold", "bias_update", "tree_switch", "localized", "consistency"),
            *("entropy", "cv_squared", "tree_cv_squared", "orthogonal"),
        },
        "compute": {"fast", "compiled", "reference"},
    }


@pytest.mark.parametrize(("axis", "kind"), ALL)
def test_read_and_write(axis: str, kind: str) -> None:
    cls = kinds(axis)[kind]
    assert (cls.axis, cls.kind) == (axis, kind)
    for choice in (cls(), filled(axis, kind)):
        words = json.loads(json.dumps(write(choice)))
        assert words["kind"] == kind
        assert set(words) == {"kind", *(field.name for field in dataclasses.fields(cls))}
        assert read(axis, words) == choice
        assert type(read(axis, words)) is cls
        assert read(axis, choice) is choice
    assert read(axis, kind) == read(axis, {"kind": kind}) == cls()
    same = {f.name for f in dataclasses.fields(cls) if getattr(filled(axis, kind), f.name) == getattr(cls(), f.name)}
    assert same == KEPT.get(kind, set())


@pytest.mark.parametrize(("axis", "kind"), ALL)
def test_a_choice_is_frozen_and_says_what_it_is(axis: str, kind: str) -> None:
    choice = filled(axis, kind)
    assert choice.describe().startswith(f"{kind}(")
    for field in dataclasses.fields(choice):
        if kind != "lora_composed":  # of which the list of experts says the rest
            assert f"{field.name}={getattr(choice, field.name)}" in choice.describe()
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(choice, field.name, None)


@pytest.mark.parametrize(("axis", "kind"), ALL)
def test_what_a_choice_declares_can_be_made(axis: str, kind: str) -> None:
    """Every tensor has a name of its own and a start that fills it; dropouts are probabilities."""
    choice = filled(axis, kind)
    params = choice.params(site_of(12, 5))
    assert len({param.name for param in params}) == len(params)
    for param in params:
        tensor = torch.full(param.shape, float("nan"))
        param.init.fill(tensor)
        assert tensor.isfinite().all(), param.name
        assert tensor.numel() == param.numel
        assert param.name.count(".") == (1 if axis == "experts" else 0)
    assert all(0 <= p < 1 for p in choice.dropouts().values())


@pytest.mark.parametrize(("axis", "kind"), ALL)
def test_unknown_fields_are_refused(axis: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key 'colour' in {axis} '{kind}'\."):
        read(axis, {"kind": kind, "colour": "red"})


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "value",
    [None, 3, True, "nothing", {}, {"k": 2}, {"kind": "nothing"}, {"kind": None}, {"kind": ["top_k"]}, ["top_k"]],
    ids=str,
)
def test_unknown_kinds_are_refused(axis: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        read(axis, value)
    assert f"{axis} is {value!r}; allowed: a kind (" in str(error.value)
    for kind in kinds(axis):
        assert repr(kind) in str(error.value)


def test_a_choice_of_another_axis_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scores is TopK\(k=2.*allowed: a kind \(.*'linear'"):
        read("scores", TopK())


@dataclass(frozen=True, kw_only=True)
class First(Selection):
    """A selection that nobody registered."""

    kind: ClassVar[str] = "first_of_the_tests"
    k: int = 1


def test_an_unregistered_choice_is_refused() -> None:
    """A file with it could not be read again."""
    with pytest.raises(ConfigError, match=r"selection is First\(k=1\); allowed: a kind \('dense'"):
        MoeLoraConfig(selection=First())


def test_a_registered_choice_is_known_by_its_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(choices._KINDS, "selection", kinds("selection"))
    assert register(First) is First
    assert register(First) is First, "a module may be imported again"
    config = MoeLoraConfig(selection={"kind": "first_of_the_tests", "k": 3})
    assert config.selection == First(k=3)
    config.save_pretrained(str(tmp_path))
    assert MoeLoraConfig.from_pretrained(str(tmp_path)) == config


def test_registering_a_kind_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choices._KINDS, "selection", kinds("selection"))

    @dataclass(frozen=True, kw_only=True)
    class Other(Selection):
        kind: ClassVar[str] = "top_k"

    with pytest.raises(ValueError, match=r"selection 'top_k' is registered twice: .*TopK.*Other"):
        register(Other)
    assert kinds("selection")["top_k"] is TopK


def test_the_registry_cannot_be_changed_through_what_it_shows() -> None:
    kinds("selection").clear()
    assert kinds("selection")


# Choices that ask for others beside them: whole presets with them are written and read in tests/presets.
WITH_OTHERS = {"block", "parts", "moe_block", "base_router", "task_embedding", "tree_keys", "tree_top", "draw"} | {
    *("grid", "phm", "poly", "residual_tree", "shards", "slots", "vector", "intuition", "task_table", "bottleneck")
}


@pytest.mark.parametrize(("axis", "kind"), [(a, k) for a, k in ALL if a != "balance" and k not in WITH_OTHERS])
def test_json_round_trip_of_a_config(axis: str, kind: str, tmp_path: Path) -> None:
    """By kind, as a dict, and as a choice; and through adapter_config.json."""
    # what else the values of `OTHER` ask for: one router for the model, and two weights
    rest: dict[str, Any] = {}
    if axis == "placement":
        rest = {"scores": "constant", "selection": "dense"}
    elif kind == "top_k":
        rest = {"balance": {"kind": "switch", "coef": 0.1}}
    elif kind == "constant":
        rest = {"experts": {"kind": "lora", "num_experts": 2}}
    words: dict[str, Any] = {**rest, axis: filled(axis, kind)}
    config = MoeLoraConfig(**words)
    words = {**rest, axis: write(filled(axis, kind))}
    assert MoeLoraConfig(**words) == config
    by_kind: dict[str, Any] = {axis: kind}
    by_choice: dict[str, Any] = {axis: kinds(axis)[kind]()}
    assert MoeLoraConfig(**by_kind) == MoeLoraConfig(**by_choice)
    config.save_pretrained(str(tmp_path))
    for loaded in (PeftConfig.from_pretrained(str(tmp_path)), MoeLoraConfig.from_pretrained(str(tmp_path))):
        assert loaded == config
        assert getattr(loaded, axis) == filled(axis, kind)


# What the choices of balance that ask something of the other axes ask for; no selection allows all of them.
NEEDED: dict[str, dict[str, Any]] = {
    "bias_update": {"scores": {"kind": "linear", "bias": True}},
    "threshold": {"selection": "learned_threshold"},
}
# One of each sort: a load-balancing loss, the z-loss, an update of biases.
TOGETHER = {"bias_update": ["bias_update", "switch", "z"], "threshold": ["threshold", "z"]}


@pytest.mark.parametrize("special", NEEDED)
def test_json_round_trip_of_several_balances(special: str, tmp_path: Path) -> None:
    used = TOGETHER[special]
    config = MoeLoraConfig(balance=[filled("balance", kind) for kind in used], **NEEDED[special])
    config.save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [choice["kind"] for choice in content["balance"]] == used
    assert MoeLoraConfig.from_pretrained(str(tmp_path)) == config


def test_one_balance_needs_no_list() -> None:
    assert MoeLoraConfig(balance="z").balance == [read("balance", "z")]
    assert MoeLoraConfig(balance=()).balance == []


def start(kind: Any, *shape: int, scale: float = 0.0) -> torch.Tensor:
    """A tensor as an `Init` fills it."""
    tensor = torch.full(shape, float("nan"))
    Init(kind, scale).fill(tensor)
    return tensor


def test_how_tensors_start() -> None:
    assert not start("zeros", 3, 4).any()
    assert abs(float(start("normal", 50, 200, scale=0.3).std()) - 0.3) < 0.01
    uniform = start("uniform", 5000, scale=0.3)
    assert 0.29 < float(uniform.max()) <= 0.3
    assert -0.3 <= float(uniform.min()) < -0.29


@pytest.mark.parametrize("shape", [(64, 300), (4, 16, 300), (1, 64, 300)])
def test_kaiming_is_that_of_a_linear_for_each_expert_alone(shape: tuple[int, ...]) -> None:
    found, bound = start("kaiming", *shape), 300**-0.5
    linear = nn.Linear(300, 64, bias=False).weight.detach()
    assert float(linear.abs().max()) <= bound
    assert 0.99 * bound < float(found.abs().max()) <= bound
    assert abs(float(found.std() / linear.std()) - 1) < 0.03


def test_a_param_knows_its_size() -> None:
    assert Param("A.up", (4, 3, 12), Init("zeros")).numel == 144


def test_two_balances_of_a_sort_are_refused() -> None:
    with pytest.raises(ConfigError, match="one load-balancing loss, one z-loss"):
        MoeLoraConfig(balance=["switch", "mixtral"])
