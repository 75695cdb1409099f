"""Reading and writing an adapter without its base model."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from moelora.compose.editing.stacked import check_output, read_stacked, write_stacked
from moelora.errors import ComposeError
from tests.adapters import PRESETS
from tests.compose.mixtures import loaded, saved, saved_by_sequence, weights


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_read_is_written_again(tmp_path: Path, preset: str) -> None:
    folder = saved(tmp_path / "in", preset, modules_to_save=["lm_head"])
    adapter = read_stacked(folder)
    write_stacked(adapter, tmp_path / "out")
    before, after = weights(folder), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in (folder, tmp_path / "out")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    model = loaded(folder, is_trainable=True)
    ours = {name: p for name, p in model.named_parameters() if "moelora_" in name}
    assert adapter.num_parameters == sum(p.numel() for p in ours.values())
    assert adapter.num_trainable == sum(p.numel() for p in ours.values() if p.requires_grad)


def test_what_belongs_to_each_expert(tmp_path: Path) -> None:
    adapter = read_stacked(saved(tmp_path / "a", "hydralora"))
    site = next(iter(adapter.sites.values()))
    assert adapter.per_expert(site) == {"B.weight", "router.weight"}
    adapter = read_stacked(saved_by_sequence(tmp_path / "b"))
    for site in adapter.sites.values():
        router = {"router.centroids"} if site.name == "model.layers.0.self_attn.q_proj" else set()
        assert adapter.per_expert(site) == {"A.weight", "B.weight"} | router
    assert adapter.shares_experts
    assert (adapter.number("two"), adapter.number("1"), adapter.number(2)) == (1, 1, 2)


def test_plain_loras_beside_mixtures_are_told_apart(tmp_path: Path) -> None:
    adapter = read_stacked(saved(tmp_path / "a", "mixlora"))
    assert {name.rpartition(".")[2] for name in adapter.mixtures()} == {"mlp"}
    assert {name.rpartition(".")[2] for name in adapter.sites} == {"mlp", "q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ComposeError, match="no mixture, only plain LoRA"):
        read_stacked(saved(tmp_path / "b", "lora")).mixtures()


def test_damaged_input_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "molora")
    file = folder / "adapter_model.safetensors"
    whole, config = file.read_bytes(), (folder / "adapter_config.json").read_text()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ComposeError, match="cut off"):
        read_stacked(folder)
    file.write_bytes(whole)
    words = json.loads(config)
    words["experts"]["num_experts"] = 5
    (folder / "adapter_config.json").write_text(json.dumps(words))
    with pytest.raises(ComposeError, match="do not belong together"):
        read_stacked(folder)
    (folder / "adapter_config.json").write_text(config[:50])
    with pytest.raises(ComposeError, match="cannot be read"):
        read_stacked(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ComposeError, match="PEFT type 'LORA'"):
        read_stacked(folder)
    file.unlink()
    with pytest.raises(ComposeError, match="holds no adapter: adapter_model.safetensors missing"):
        read_stacked(folder)


def test_an_output_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "molora")
    with pytest.raises(ComposeError, match="is the input"):
        check_output(folder / ".." / "a", folder)
    (tmp_path / "half").mkdir()
    with pytest.raises(ComposeError, match="exists"):
        check_output(tmp_path / "half", folder)


def test_without_space_nothing_is_left(tmp_path: Path) -> None:
    adapter = read_stacked(saved(tmp_path / "a", "molora"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a file that grows past this fails as on a full disk
    try:
        with pytest.raises(ComposeError, match="cannot be written"):
            write_stacked(adapter, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    write_stacked(adapter, tmp_path / "out")
    assert torch.equal(next(iter(weights(tmp_path / "out").values())), next(iter(weights(tmp_path / "a").values())))
