"""Every preset for a few steps: the cells, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from eval.speed.models import shared_copy
from eval.zoo import __main__ as program
from eval.zoo import bases, cell, profile, shared_routers
from eval.zoo.bases import Base
from eval.zoo.cell import Wishes
from moelora import MoeLoraConfig, presets
from moelora.runs.models import ModelSource, load_model, load_tokenizer
from moelora.runs.parameters import count_parameters
from tests.adapters import SMALL, small_config
from tests.conftest import tiny_batch, tiny_model
from tests.runs.tiny import tiny_folder


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """Presets are tried, small, on a tiny model; memory is not measured."""
    tiny_folder(tmp_path / "model")
    source = ModelSource(str(tmp_path / "model"), "bfloat16")
    base = Base("tiny", lambda tokenizer: load_model(source), "CAUSAL_LM")
    for module in (bases, cell):
        monkeypatch.setattr(module, "tokenizer", lambda: load_tokenizer(source))
    for module in (bases, cell, profile, shared_routers):
        monkeypatch.setattr(module, "base_of", lambda preset: base)
    for module in (cell, profile, shared_routers):
        monkeypatch.setattr(module, "config_of", lambda preset, kind, **words: small_config(preset, **words))
    peaks = {"ours": 300, "equal_size": 200}
    monkeypatch.setattr(
        cell, "peak_memory", lambda build, inputs, work: peaks["ours" if build.args[1] is None else "equal_size"]
    )
    return base


def run(folder: Path, *words: str) -> int:
    return program.main([*words, "--steps", "4", "--rounds", "2", "--output", str(folder)])


def test_presets_are_tried_once_and_again_after_their_defaults_changed(
    tiny: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "zoo"
    chosen = ("--only", "molora", "--only", "mixlora")
    assert run(output, *chosen) == 0
    found = json.loads((output / "cells" / "mixlora.json").read_text())
    assert found["loss_after"] < found["loss_before"]
    assert found["ranks"]["equal_rank"] == SMALL["mixlora"]["r"] * SMALL["mixlora"]["num_experts"]
    assert set(found["step_seconds"]) == {"ours", "equal_rank", "equal_size"}
    assert all(len(calls) == 2 for calls in found["step_seconds"].values())
    assert found["receipt"]["command"] == "python -m eval.zoo"
    table = (output / "README.md").read_text()
    assert table.count("\n| `") == 2
    assert "| 1.50 |" in table
    missing = table.split("Not tried yet: ")[1].split(".**")[0].split(", ")
    assert sorted([*missing, "mixlora", "molora"]) == sorted(presets.available())
    capsys.readouterr()

    monkeypatch.setattr(cell, "measure", lambda *_: pytest.fail("it is done already"))
    assert run(output, *chosen) == 0
    assert "to do: none" in capsys.readouterr().out
    (output / "README.md").unlink()
    monkeypatch.setattr(cell, "measure", lambda *_: 1 / 0)
    assert run(output, "--only", "lora") == 1  # what fails is named; what is done is on the page
    assert "1 of 1 cells failed: lora (ZeroDivisionError, above)" in capsys.readouterr().err
    assert (output / "README.md").read_text() == table
    monkeypatch.setattr(cell, "config_of", lambda preset, kind: MoeLoraConfig.from_preset(preset, r=3))
    assert run(output, *chosen, "--plan") == 0
    assert "2 to do: mixlora, molora" in capsys.readouterr().out


def test_what_cannot_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--only", "mixlorra") == 1
    assert "mixlora" in capsys.readouterr().err
    assert program.main(["--steps", "0", "--output", str(tmp_path)]) == 1
    assert "steps is 0" in capsys.readouterr().err


def test_stopped_it_ends_as_every_program_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run", stop)
    assert run(tmp_path) == 130
    assert "Run the same command again" in capsys.readouterr().err


def test_the_tasks_are_the_quickstarts(tiny: Base) -> None:
    assert len(bases.tasks()) == 4
    rows = bases.rows_of(tiny, bases.tokenizer(), 2, seed=1)
    assert sorted(rows["task_ids"]) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("preset", presets.available())
def test_every_preset_fits_the_base_that_it_is_tried_on(preset: str) -> None:
    kind = bases.base_of(preset)
    model = {"CAUSAL_LM": "llama" if kind is bases.SMOLLM2 else "olmoe", "SEQ_CLS": "bert"}[kind.task_type]
    config = MoeLoraConfig.from_preset(preset, **{**SMALL[preset], "task_type": kind.task_type})
    assert config.num_trainable_parameters(tiny_model(model)) > 0
    assert cell.config_of(preset, kind).preset == preset


def test_mola_fits_the_layers_of_the_real_model() -> None:
    config = cell.config_of("mola", bases.SMOLLM2)
    assert config.num_trainable_parameters(tiny_model(num_hidden_layers=30)) > 0


def test_a_lora_beside_perft_leaves_the_experts_of_the_base_alone() -> None:
    model = get_peft_model(tiny_model("olmoe"), cell.lora_config(bases.MOE, 3, 0.05))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".self_attn." in name for name in trained)


def test_the_rank_of_a_lora_of_equal_size(tiny: Base) -> None:
    base = tiny.make(None)
    for r in (1, 3, 8):
        wanted = count_parameters(shared_copy(base), cell.lora_config(tiny, r, 0.0)).trainable
        assert cell.equal_size(base, tiny, wanted, 0.0) == r
    assert cell.equal_size(base, tiny, 1, 0.0) == 1


def test_the_step_whose_memory_is_measured_knows_the_tasks() -> None:
    model = tiny_model().requires_grad_(False)
    config = MoeLoraConfig.from_preset("poly", **SMALL["poly"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).train()
    inputs = {**tiny_batch(), "task_ids": torch.tensor([0, 1, 1])}
    seen: list[str] = []
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: seen.append(name))
    cell.step_with_tasks(inputs)(adapted)
    assert seen
    assert cell.total_rank(adapted) == SMALL["poly"]["r"] * config.experts.num_experts


def test_shards_have_the_rank_of_the_lora_that_they_build() -> None:
    config = MoeLoraConfig.from_preset("mos", **SMALL["mos"], task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_model(), config)
    assert (
        cell.total_rank(adapted)
        == adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_factors("", "default").a_ERD.shape[1]
    )


def test_the_wishes_are_part_of_what_a_cell_is(tiny: Base) -> None:
    first, second = (program._identity("mixlora", Wishes(steps=steps)) for steps in (1, 2))
    assert first != second
    assert first["base"] == "tiny"
    assert isinstance(first["preset"]["experts"], dict)
    assert not any("version" in key for key in first["preset"])
