"""What a card says an adapter can be exported to is what the exporters do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moelora.errors import ExportError
from moelora.export import distill_lora, export_loras, to_native_moe, write_mixlora
from moelora.export.targets import export_targets
from moelora.hub import read_adapter
from tests.adapters import PRESETS, adapted
from tests.export.mixtures import base_folder, composition, fill_centroids, saved

_ONE = {"kind": "linear", "routers": "per_model"}
_CENTROIDS = {"kind": "centroids", "features": 36}
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "task": {},
    "constant": {"scores": "constant"},
    "nearest": {"scores": _CENTROIDS, "selection": "nearest", "placement": _ONE},
    "centroids mixed": {"scores": _CENTROIDS, "placement": _ONE},
    "task blocks": {"placement": "feed_forward"},
    "top k": {"scores": "linear", "selection": {"kind": "top_k", "k": 2}},
    "raw top k blocks": {
        "scores": "linear",
        "selection": {"kind": "top_k", "k": 2, "renormalize": False},
        "placement": "feed_forward",
    },
}
EXPORTS: dict[str, Callable[[Path, Path], object]] = {
    "--to native-moe": lambda adapter, output: to_native_moe(adapter, output),
    "--to lora": lambda adapter, output: export_loras(adapter, output),
    "--to lora --rank R": lambda adapter, output: distill_lora(adapter, output, rank=2),
    "--to mixlora": lambda adapter, output: write_mixlora(adapter, output),
}


def checked(adapter: Path) -> dict[str, str]:
    """Export an adapter in every form and compare with what is foretold; the answers by command."""
    info = read_adapter(adapter)
    answers: dict[str, str] = {}
    for target in export_targets(info.config, is_routed=info.is_routed):
        answers[target.command] = target.answer
        output = adapter.parent / target.command.replace(" ", "-")
        refusal = None
        try:
            EXPORTS[target.command](adapter, output)
        except ExportError as error:
            refusal = str(error)
        assert target.answer == "depends" or (target.answer == "yes") == (refusal is None), (target, refusal)
        # one that is not routed is refused by what it lacks, in words of each exporter
        assert target.answer != "no" or target.words == refusal or not info.is_routed
    return answers


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(tmp_path: Path, preset: str) -> None:
    base = base_folder(tmp_path / "base")
    model = adapted(preset)
    model.peft_config["default"].base_model_name_or_path = str(base)
    answers = checked(saved(model, tmp_path / "adapter"))
    renormalised = preset in ("mixlora", "random_router")
    assert answers["--to native-moe"] == ("depends" if renormalised or preset == "mixlora_switch" else "no")
    assert answers["--to mixlora"] == ("depends" if renormalised else "no")
    assert answers["--to lora"] == ("yes" if preset == "lora" else "no")


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions(tmp_path: Path, name: str) -> None:
    base = base_folder(tmp_path / "base")
    model = composition(base, **COMPOSITIONS[name])
    fill_centroids(model, torch.randn(3, 36))
    answers = checked(saved(model, tmp_path / "adapter"))
    exact = name in ("task", "constant", "nearest", "task blocks")
    assert answers["--to lora"] == ("yes" if exact else "no")


@pytest.mark.parametrize("renormalize", [True, False])
def test_what_depends_on_the_base(tmp_path: Path, renormalize: bool) -> None:
    base = base_folder(tmp_path / "base")
    selection = {"kind": "top_k", "k": 2, "renormalize": renormalize}
    words: dict[str, Any] = {"scores": "linear", "selection": selection, "placement": "feed_forward"}
    model = composition(base, experts={"kind": "lora", "num_experts": 3, "r": 4}, **words)
    adapter = saved(model, tmp_path / "adapter")
    config = read_adapter(adapter).config
    (target,) = (each for each in export_targets(config) if each.command == "--to native-moe")
    assert target.answer == "depends"
    assert ("Qwen3MoeForCausalLM, FlexOlmoForCausalLM" in target.words) is not renormalize
    if renormalize:
        to_native_moe(adapter, tmp_path / "moe")
    else:
        with pytest.raises(ExportError, match="MixtralForCausalLM always renormalises"):
            to_native_moe(adapter, tmp_path / "moe")
