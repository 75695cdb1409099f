"""Comparisons on tasks of reasoning-gym: every way to see the tasks, on a tiny model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from eval.compare.__main__ import main
from eval.compare.cells import Board, Cell
from eval.compare.regimes import orthogonal
from eval.compare.regimes.base import Work
from eval.compare.regimes.in_turn import InTurn
from eval.compare.schema import load_benchmark
from eval.compare.sizes import check_sizes
from eval.compare.skill_bench import SkillBench
from eval.compare.summary import summarize
from eval.scoring.model_scores import ModelScores
from moelora.errors import MoeLoraError
from moelora.runs.folder import RunDir
from moelora.runs.models import ModelSource
from tests.eval.compare.tiny import write_benchmark
from train.sft import RunTrainer

SEED = 1
LORA = {"peft": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
PART = {**LORA, "r": 2, "lora_alpha": 4}
EXPERT = {"preset": "lora", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
METHODS: dict[str, Any] = {
    "joint": {"title": "joint", "adapter": LORA},
    "loras": {"title": "apart", "adapter": PART, "regime": {"kind": "apart"}},
    "in_turn": {"title": "in turn", "adapter": LORA, "regime": {"kind": "in_turn", "replay": 0.25}},
    "orthogonal": {"title": "orthogonal", "adapter": PART, "regime": {"kind": "orthogonal", "weight": 0.1}},
    "grown": {
        "title": "grown",
        "adapter": EXPERT,
        "regime": {"kind": "grown", "sequential": {"start": "previous"}},
        "against": "in_turn",
    },
    "centroids": {"title": "centroids", "regime": {"kind": "composed", "of": "loras", "router": "centroids"}},
    "uniform": {"title": "uniform", "regime": {"kind": "composed", "of": "loras", "router": "uniform"}},
    "topk": {
        "title": "topk",
        "regime": {"kind": "composed", "of": "loras", "router": {"kind": "topk", "top_k": 1}, "tune": {"max_steps": 1}},
    },
    "ties": {
        "title": "ties",
        "regime": {"kind": "composed", "of": "loras", "merge": {"combination_type": "ties", "density": 0.5}},
    },
    "arrow": {"title": "arrow", "regime": {"kind": "composed", "of": "loras", "arrow": {"top_k": 1}}},
}
for method in METHODS.values():
    method["seeds"] = [SEED]
CHANGES: dict[str, Any] = {
    "data": {
        "tasks": {"gcd": {"max_value": 90}, "letter_counting": {"min_words": 2, "max_words": 3}},
        "foreign": {"leg_counting": {"max_animals": 3}},
        "rows_per_task": 8,
        "selection_rows": 3,
        "fit_rows": 3,
        "system": "Reply.",
    },
    "training": {"per_device_train_batch_size": 4, "num_train_epochs": 1, "dataloader_pin_memory": False},
    "selection": {"learning_rates": [0.01]},
    "evaluation": {"limit": 4, "batch_size": 4},
    "reference": "joint",
    "methods": METHODS,
}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = write_benchmark(folder, **{**copy.deepcopy(CHANGES), **changes})
    words = file.read_text().replace("protocol: loglik\n", "")
    file.write_text(words)
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that ran to its end."""
    folder = tmp_path_factory.mktemp("skills")
    assert main([str(write(folder))]) == 0
    return folder


def board_of(folder: Path) -> Board:
    return Board(load_benchmark(folder / "benchmark.yaml"))


def read(folder: Path, method: str) -> ModelScores:
    return ModelScores.read(folder / "results" / "cells" / f"{method}-seed{SEED}.json")


def folder_of(folder: Path, method: str) -> Path:
    board = board_of(folder)
    return board.folder(board.final(method, SEED))


def test_every_method_is_scored_on_the_same_problems(finished: Path) -> None:
    summary = summarize(board_of(finished))
    assert summary is not None
    assert [method.key for method in summary.methods] == ["base", *sorted(METHODS)]
    assert not summary.missing
    for key, words in METHODS.items():
        scores = read(finished, key)
        assert scores.parameters["trainable"] == read(finished, "joint").parameters["trainable"]
        assert all(len(task.values) == 4 for task in scores.tasks.values())
        assert scores.extra["training"]["order"] == ["letter_counting", "gcd"]  # seed 1 begins with the second
        if words.get("regime", {}).get("kind") != "composed":
            # eight rows of each of two tasks in batches of four; two more rows are trained on again
            assert scores.extra["training"]["steps"] == (5 if key == "in_turn" else 4)
    text = (finished / "results" / "README.md").read_text()
    assert "## Means and differences" in text
    assert "| in turn |" in text.split("## Means")[1].split("| grown |")[1].splitlines()[0]
    content = json.loads((finished / "results" / "summary.json").read_text())["methods"]
    assert content["grown"]["compared_with"] == "in_turn"
    assert content["loras"]["compared_with"] == "joint"


def test_what_comes_in_turn_is_also_scored_right_after_each_task(finished: Path) -> None:
    for key in METHODS:
        learned = read(finished, key).extra["training"].get("learned")
        in_turn = key in ("in_turn", "orthogonal", "grown")
        assert (learned is not None) == in_turn
        if in_turn:
            # nothing comes after the last task
            assert learned["gcd"] == read(finished, key).tasks["gcd"].values


def test_prompts_and_the_experts_that_they_go_to(finished: Path) -> None:
    for key in METHODS:
        chosen = read(finished, key).extra.get("chosen")
        assert (chosen is not None) == (key in ("centroids", "grown"))
    shares = read(finished, "grown").extra["chosen"]
    assert shares["foreign_at_base"] == 0.0  # it was asked for no threshold
    assert set(shares["own"]) == {"gcd", "letter_counting"}


def test_a_composition_is_made_of_the_loras_of_its_seed(finished: Path) -> None:
    sources = [
        each["source"]
        for each in json.loads((folder_of(finished, "uniform") / "adapter" / "adapter_config.json").read_text())[
            "experts"
        ]["sources"]
    ]
    assert len(sources) == 2
    # what it took is noted before it is scored, and not beside the adapter, which was not trained
    assert json.loads((folder_of(finished, "uniform") / "made" / "training.json").read_text())["steps"] == 0
    assert not (folder_of(finished, "uniform") / "adapter" / "training.json").exists()
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    ids = torch.tensor([[5, 9, 17, 30]])
    parts = {}
    for task in ("gcd", "letter_counting"):
        lora = PeftModel.from_pretrained(model, folder_of(finished, "loras") / "stages" / task)
        parts[task] = {name: m.get_delta_weight("default") for name, m in lora.named_modules() if _is_lora(m)}
        lora.unload()
    uniform = PeftModel.from_pretrained(model, folder_of(finished, "uniform") / "adapter")
    ours = uniform(ids).logits
    base = uniform.unload()
    for name, delta in parts["gcd"].items():
        base.get_submodule(name.removeprefix("base_model.model.")).weight.data += (
            delta + parts["letter_counting"][name]
        ) / 2
    torch.testing.assert_close(ours, base(ids).logits, rtol=1e-4, atol=1e-4)


def _is_lora(module: Any) -> bool:
    return hasattr(module, "get_delta_weight")


def test_the_sum_of_orthogonal_loras(finished: Path) -> None:
    folder = folder_of(finished, "orthogonal")
    base = AutoModelForCausalLM.from_pretrained(finished / "model")
    deltas: dict[str, Any] = {}
    for own in ("own/1-letter_counting", "own/2-gcd"):
        lora = PeftModel.from_pretrained(base, folder / own)
        for name, module in lora.named_modules():
            if _is_lora(module):
                deltas[name] = deltas.get(name, 0) + module.get_delta_weight("default")
        lora.unload()
    whole = PeftModel.from_pretrained(base, folder / "stages" / "2-gcd")
    for name, module in whole.named_modules():
        if _is_lora(module):
            torch.testing.assert_close(module.get_delta_weight("default"), deltas[name])


def test_the_penalty_is_the_overlap_of_what_is_read(finished: Path) -> None:
    folder = folder_of(finished, "orthogonal")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(finished / "model"),
        folder / "stages/1-letter_counting",
        adapter_name="old",
    )
    model.add_adapter("default", model.peft_config["old"])
    expected = torch.tensor(0.0)
    for module in model.modules():
        if isinstance(getattr(module, "lora_A", None), torch.nn.ModuleDict) and "old" in module.lora_A:
            for old in module.lora_A["old"].weight:
                for new in module.lora_A["default"].weight:
                    expected = expected + (old * new).sum().abs()
    assert expected > 0
    torch.testing.assert_close(orthogonal.overlap(model), expected)


def test_replay_keeps_a_share_of_each_earlier_task(finished: Path) -> None:
    config = load_benchmark(finished / "benchmark.yaml")
    bench = SkillBench.open(Board(config), check_sizes(config), "")
    seen: list[list[str]] = []

    class Recorded(Work):
        def train(self, stage: str, make_model: Any, rows: Any, **changes: Any) -> Path:
            seen.append([row["prompt"][-1]["content"] for row in rows])
            return Path(stage)

    work = Recorded(
        source=ModelSource("none"),
        tokenizer=None,
        folder=RunDir(finished / "none"),
        rows=bench.rows,
        fit_rows={},
        seed=0,
        make_config=lambda: None,
        adapter_dtype="auto",
        arguments=lambda stage: None,
        label="",
        trainer_class=RunTrainer,
    )
    InTurn(replay=0.25).train(work)
    first, second = ([row["prompt"][-1]["content"] for row in rows] for rows in bench.rows.values())
    assert seen[0] == first
    assert seen[1][: len(second)] == second
    assert len(seen[1]) == len(second) + 2  # a quarter of eight
    assert set(seen[1][len(second) :]) < set(first)


def test_stopped_between_two_tasks_and_resumed_it_ends_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {key: METHODS[key] for key in ("joint", "in_turn", "orthogonal", "grown")}
    methods["grown"] = {**methods["grown"], "against": None}
    file = write(tmp_path / "again", methods=methods)
    from train import sft

    original, count = sft.train_stage, 0

    def stop(stage: str, make_model: Any, args: Any, folder: RunDir, *arguments: Any, **words: Any) -> None:
        nonlocal count
        count += not folder.is_finished(stage)
        if not folder.is_finished(stage) and count % 2 == 0:
            raise KeyboardInterrupt
        original(stage, make_model, args, folder, *arguments, **words)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "train_stage", stop)
        patch.setattr("train.sequential.train_stage", stop)
        for _ in range(12):
            if main([str(file)]) == 0:
                break
        assert count > 10
    for key in methods:
        one, other = read(finished, key), read(tmp_path / "again", key)
        assert one.tasks == other.tasks
        a, b = (_weights(folder_of(folder, key)) for folder in (finished, tmp_path / "again"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        f"{file.relative_to(folder)} {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        if "checkpoints" not in file.parts
        for name, tensor in load_file(file).items()
    }


def test_a_composition_waits_for_its_loras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a")
    assert main([str(file), "--only", "uniform"]) == 1
    assert f"uniform-seed{SEED} waits for loras-seed{SEED}" in capsys.readouterr().err
    board = board_of(tmp_path / "a")
    assert board.waits_for(Cell("base")) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "methods.joint.regime=upside_down",
            "allowed kinds: together, in_turn, orthogonal, apart, grouped, grown, composed",
        ),
        ("methods.joint.regime={kind: in_turn, replay: 2}", "replay is 2.0; allowed: a share"),
        ("methods.joint.regime={kind: in_turn, of: loras}", "unknown key 'of'"),
        ("methods.uniform.adapter={peft: lora, r: 2}", "has an adapter with regime 'composed'"),
        ("methods.joint.adapter=null", "has no adapter with regime 'together'"),
        ("methods.uniform.regime.of=joint", "unknown key 'joint' in methods.uniform.regime.of"),
        ("methods.uniform.regime.arrow={top_k: 1}", "says router and arrow"),
        ("methods.uniform.seeds=[0]", r"asks for the seeds \[0\], which loras"),
        ("methods.grown.against=nobody", "unknown key 'nobody'"),
        ("methods.grown.regime.sequential={start: anywhere}", "regime.sequential.start is 'anywhere'"),
        ("data.tasks={gcd: {}}", "data.tasks has 1 task"),
        ("data.fit_rows=9", "data.fit_rows is 9 with rows_per_task 8; allowed: 1 to 8"),
        ("methods.base={title: b, adapter: {peft: lora, r: 4}}", "methods.base: that is the base model's name"),
        ("data={tasks: [boolq]}", "with tasks of the suite commonsense; allowed: 'together'"),
        ("evaluation.earlier_turns=2", "evaluation.earlier_turns is 2; allowed: 0 to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(finished: Path, override: str, message: str) -> None:
    with pytest.raises(MoeLoraError, match=message):
        load_benchmark(finished / "benchmark.yaml", [override])


@pytest.mark.parametrize(
    ("override", "cell", "message"),
    [
        (
            "data.tasks={letter_counting: {min_words: 2, max_words: 3}, gcd: {max_value: 90}}",
            "in_turn",
            r"data.tasks in order: \['gcd', 'letter_counting'\] -> \['letter_counting', 'gcd'\]",
        ),
        (
            "data.foreign={leg_counting: {max_animals: 3}, caesar_cipher: {}}",
            "in_turn",
            r"data.foreign in order: \['leg_counting'\] -> \['leg_counting', 'caesar_cipher'\]",
        ),
        ("data.tasks.made_up={}", "base", "scored tasks in order: .* -> .*'made_up'"),
        ("data.rows_per_task=9", "base", "data.rows_per_task: 8 -> 9"),
        ("data.selection_rows=4", "base", "data.selection_rows: 3 -> 4"),
    ],
)
def test_what_a_result_depends_on(finished: Path, override: str, cell: str, message: str) -> None:
    """Names of tasks without options and their order, and of the base model what is not asked about."""
    board = Board(load_benchmark(finished / "benchmark.yaml", [override]))
    with pytest.raises(MoeLoraError, match=message):
        board.is_finished(Cell("base") if cell == "base" else Cell("final", cell, SEED))


def test_each_problem_is_asked_after_a_solved_one_of_another_task(finished: Path) -> None:
    def benches(*overrides: str) -> SkillBench:
        config = load_benchmark(finished / "benchmark.yaml", overrides)
        return SkillBench.open(Board(config), check_sizes(config), "")

    alone, after = benches(), benches("evaluation.earlier_turns=1")
    for tasks in ("selection", "problems"):
        plain, mixed = getattr(alone, tasks), getattr(after, tasks)
        for task, its, other in zip(plain, mixed, mixed[::-1], strict=True):
            assert its.problems == task.problems
            for i, prompt in enumerate(its.prompts):
                earlier, text = other.problems[i], after.tokenizer.decode(prompt)
                before = text.index(earlier.prompt), text.index(earlier.answer), text.index(task.problems[i].prompt)
                assert before == tuple(sorted(before))
                # nothing but the earlier turns is added, behind the system message
                own = after.tokenizer.decode(task.prompts[i])
                assert text.endswith(own[own.index(task.problems[i].prompt) :])
                assert text.count("Reply.") == 1
