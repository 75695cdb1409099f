"""An axis as a word of `from_preset` changes what the preset chose there, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moelora import MoeLoraConfig
from moelora.balance.z_loss import ZLoss
from moelora.errors import ConfigError
from moelora.selection.dense import Dense
from moelora.selection.top_p import TopP
from tests.adapters import FAMILY

AXES = ("experts", "placement", "scores", "selection", "balance")


def axes(config: MoeLoraConfig) -> dict[str, Any]:
    return {axis: getattr(config, axis) for axis in AXES}


@pytest.mark.parametrize("name", FAMILY)
def test_an_empty_change_is_none(name: str) -> None:
    """With the words of PEFT beside it, which stay."""
    words: dict[str, Any] = {"target_modules": ["up_proj"], "balance_scope": "micro_batch", "inference_mode": True}
    config = MoeLoraConfig.from_preset(name, **words)
    changed = MoeLoraConfig.from_preset(name, **words, scores={}, selection={}, experts={}, placement={})
    assert changed == config
    assert changed.preset == name


def test_fields_change_and_the_rest_stays() -> None:
    plain = MoeLoraConfig.from_preset("mixlora", r=3, num_experts=5)
    config = MoeLoraConfig.from_preset("mixlora", r=3, num_experts=5, selection={"renormalize": False})
    assert axes(config) == {**axes(plain), "selection": replace(plain.selection, renormalize=False)}


@pytest.mark.parametrize("change", ["dense", {"kind": "dense"}, Dense(renormalize=True)], ids=str)
def test_a_kind_keeps_the_fields_that_it_has_too(change: Any) -> None:
    """Of top-k that is `renormalize`; `k` means nothing to dense selection."""
    config = MoeLoraConfig.from_preset("mixlora", selection=change)
    assert config.selection == Dense(renormalize=True)


def test_what_is_said_wins() -> None:
    found = MoeLoraConfig.from_preset("mixlora", selection={"kind": "top_p", "p": 0.5, "renormalize": False})
    assert found.selection == TopP(p=0.5, renormalize=False)


@pytest.mark.parametrize("change", ["z", {"kind": "z"}, [ZLoss()], []], ids=str)
def test_balance_is_replaced(change: Any) -> None:
    assert MoeLoraConfig.from_preset("mixlora", balance=change).balance == ([] if change == [] else [ZLoss()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"selection": {"q": 1}}, r"unknown key 'q' in selection 'top_k'"),
        ({"selection": "nothing"}, r"selection is 'nothing'; allowed: a kind"),
        ({"selection": {"kind": ["top_k"]}}, r"selection is .*; allowed: a kind"),
        ({"selection": 3}, r"selection is 3; allowed: a kind"),
        ({"selection": {"k": 9}}, r"top_k is 9; allowed: 1 to num_experts \(8\)"),
        ({"selections": "dense"}, r"unknown key 'selections' in preset 'mixlora'.*Did you mean 'selection'"),
    ],
)
def test_what_is_wrong_is_refused_as_ever(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig.from_preset("mixlora", **words)
