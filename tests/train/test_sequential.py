"""Tasks one after the other, each with an expert of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed

from moelora import record_routing
from moelora.compose.tokens import batches, tokenize
from moelora.runs.config import load_config, training_config
from moelora.runs.data import load_rows
from moelora.runs.models import load_adapter, load_tokenizer
from tests.runs.tiny import tiny_tokenizer, write_run
from tests.train.test_sft import StopAfter
from train import sft
from train.__main__ import main

ROOT = Path(__file__).parents[2]
TASKS = ["gcd", "letter_counting", "chain_sum"]
DATASET = {
    "tasks": {"gcd": {}, "letter_counting": {"min_words": 2, "max_words": 3}, "chain_sum": {}},
    "rows_per_task": 8,
}
ADAPTER = {"preset": "lora", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def write_sequential(folder: Path, **changes: Any) -> Path:
    """The YAML file of a sequential run on three tasks."""
    folder.mkdir(exist_ok=True)
    words = {"recipe": "sequential", "adapter": ADAPTER, "dataset": DATASET, **changes}
    words.pop("sequential", None)
    return write_run(folder, **words, sequential={"order": TASKS, **changes.get("sequential", {})})


def stage(folder: Path, number: int) -> Path:
    return folder / "run/stages" / f"{number}-{TASKS[number - 1]}"


def outputs(file: Path, adapter: Path, task: str) -> tuple[list[Tensor], list[int | None]]:
    """Logits of each row of a task by an adapter, and the experts that it went to."""
    config = load_config(file)
    tokenizer = load_tokenizer(config)
    rows = [row for row in load_rows(config.dataset, tokenizer) if row["task"] == task]
    model = load_adapter(AutoModelForCausalLM.from_pretrained(config.model), str(adapter)).eval()
    logits, experts = list[Tensor](), list[int | None]()
    for batch in batches(tokenize(rows, tokenizer), 1, "cpu"):
        with torch.no_grad(), record_routing(model) as listener:
            logits.append(model(**batch).logits)
        ids = listener.records[0].routing.ids_TK
        experts.append(None if ids is None else int(ids[0, 0]))
    return logits, experts


def test_training_routes_by_the_prompt_alone_as_the_finished_model_does(tmp_path: Path) -> None:
    """The loss that computes the logits of labelled positions only hides the labels from the model."""
    file = write_sequential(tmp_path / "a", sequential={"embedding": "input", "order": TASKS[:2]})
    assert main([str(file)]) == 0
    config = load_config(file)
    tokenizer = load_tokenizer(config)
    (batch,) = batches(tokenize(load_rows(config.dataset, tokenizer).select(range(4)), tokenizer), 4, "cpu")
    model = load_adapter(
        AutoModelForCausalLM.from_pretrained(config.model), str(stage(tmp_path / "a", 2)), is_trainable=True
    )
    rows = load_rows(config.dataset, tokenizer)
    trainer = sft.make_trainer(model, training_config(config, tmp_path / "checkpoints"), rows, tokenizer)

    def cosines(run: Callable[[], Any]) -> Tensor:
        with record_routing(model) as listener:
            run()
        valid_T = listener.records[0].valid_T
        return listener.records[0].routing.logits_TE[valid_T]

    in_training = cosines(lambda: trainer.compute_loss(model.train(), dict(batch)))
    by_prompt = cosines(lambda: model.eval()(**batch))
    by_text = cosines(lambda: model(**{name: tensor for name, tensor in batch.items() if name != "labels"}))
    assert in_training.equal(by_prompt)
    assert not torch.allclose(by_text, by_prompt, atol=1e-3)


@pytest.mark.parametrize("start", ["zero", "mean", "previous"])
def test_what_was_learnt_stays_bit_for_bit(tmp_path: Path, start: str) -> None:
    file = write_sequential(tmp_path / start, sequential={"start": start, "embedding": "input"})
    assert main([str(file), "training.weight_decay=0.1"]) == 0
    folder = file.parent
    first, before = outputs(file, stage(folder, 1), "gcd")
    assert set(before) == {0}
    for number in (2, 3):
        later, experts = outputs(file, stage(folder, number), "gcd")
        kept = [e == 0 for e in experts]
        assert sum(kept) >= 6, "the keys tell the tasks apart"
        assert all(a.equal(b) for a, b, same in zip(later, first, kept, strict=True) if same)
    _, experts = outputs(file, folder / "run/adapter", "chain_sum")
    assert sum(e == 2 for e in experts) >= 6
    final = load_file(folder / "run/adapter/adapter_model.safetensors")
    last = load_file(stage(folder, 3) / "adapter_model.safetensors")
    assert all(final[name].equal(tensor) for name, tensor in last.items())
    words = json.loads((folder / "run/adapter/adapter_config.json").read_text())
    assert words["scores"]["turn_start"] == [tiny_tokenizer().convert_tokens_to_ids("<|user|>")]
    assert words["experts"]["names"] == TASKS
    assert words["experts"]["num_frozen"] == 2
    # each of the experts learnt something of its own
    products = [
        torch.matmul(
            torch.cat([final[f"{at}.moelora_B.weight_frozen"], final[f"{at}.moelora_B.weight"]]),
            torch.cat([final[f"{at}.moelora_A.weight_frozen"], final[f"{at}.moelora_A.weight"]]),
        )
        for at in sorted({name.partition(".moelora_")[0] for name in final})
    ]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert all((each[a] - each[b]).abs().max() > 1e-4 for each in products)


def test_a_run_that_is_stopped_in_a_task_or_between_two_goes_on_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = (write_sequential(tmp_path / name) for name in ("whole", "stopped"))
    assert main([str(whole)]) == 0
    start = sft.RunTrainer.train
    calls = 0

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # in the second task, once a checkpoint is written
            self.add_callback(StopAfter())
        if calls == 4:  # before the third
            raise KeyboardInterrupt
        return start(self, *args, **kwargs)

    monkeypatch.setattr(sft.RunTrainer, "train", interrupted)
    assert main([str(stopped)]) == 130
    assert not (tmp_path / "stopped/run/adapter").exists()
    assert stage(tmp_path / "stopped", 1).is_dir()
    assert not stage(tmp_path / "stopped", 2).exists()
    assert main([str(stopped), "adapter.r=3"]) == 1
    assert "another configuration: adapter.r: 2 -> 3" in capsys.readouterr().err
    assert main([str(stopped)]) == 130
    assert "stages/2-letter_counting/checkpoint-2" in capsys.readouterr().out
    assert main([str(stopped)]) == 0
    assert calls == 5
    expected = load_file(tmp_path / "whole/run/adapter/adapter_model.safetensors")
    found = load_file(tmp_path / "stopped/run/adapter/adapter_model.safetensors")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.equal(found[name]), name


def test_a_common_lora_is_learnt_with_the_first_task_and_stays(tmp_path: Path) -> None:
    file = write_sequential(tmp_path / "a", sequential={"common": ["q_proj"], "order": TASKS[:2]})
    assert main([str(file)]) == 0
    first, second = (load_file(stage(tmp_path / "a", n) / "adapter_model.safetensors") for n in (1, 2))
    common = [name for name in first if "q_proj" in name]
    assert common
    for name in common:
        assert first[name].shape[0] == 1
        assert second[name].equal(first[name])
    assert any(first[name].any() for name in common if "moelora_B" in name)
    assert not stage(tmp_path / "a", 3).exists()


def test_with_linear_gates_the_new_row_and_expert_alone_move_and_old_rows_are_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    make = sft.make_trainer

    def noted(model: Any, args: Any, rows: Any, *others: Any) -> Any:
        seen.append(sorted(rows["task"]))
        return make(model, args, rows, *others)

    monkeypatch.setattr(sft, "make_trainer", noted)
    file = write_sequential(tmp_path / "a", sequential={"router": "linear", "replay": 0.5, "order": TASKS[:2]})
    assert main([str(file), "training.weight_decay=0.1"]) == 0
    assert seen == [["gcd"] * 8, ["gcd"] * 4 + ["letter_counting"] * 8]
    first, second = (load_file(stage(tmp_path / "a", n) / "adapter_model.safetensors") for n in (1, 2))
    assert any("router.weight" in name for name in first)
    for name, tensor in first.items():
        assert second[f"{name}_frozen"].equal(tensor)
        if "router" in name:
            assert not second[name].equal(tensor)  # where it started


def test_the_baseline_is_one_lora_of_the_same_size_on_the_tasks_in_turn(tmp_path: Path) -> None:
    file = write_sequential(
        tmp_path / "a",
        sequential={"embedding": "input", "order": TASKS[:2]},
        baseline={"target_modules": ADAPTER["target_modules"], "training": {"seed": 3}},
    )
    assert main([str(file)]) == 0
    run = tmp_path / "a/run"
    config = load_config(file)
    tokenizer = load_tokenizer(config)
    # what training the first stage's adapter on the second task gives
    rows = load_rows(config.dataset, tokenizer)
    second = rows.select([i for i, task in enumerate(rows["task"]) if task == TASKS[1]])
    base = AutoModelForCausalLM.from_pretrained(config.model)
    set_seed(3)
    model = load_adapter(base, str(run / f"stages/baseline-1-{TASKS[0]}"), is_trainable=True)
    arguments = training_config(config, tmp_path / "checkpoints", {"seed": 3})
    sft.make_trainer(model, arguments, second, tokenizer).train()
    found = load_file(run / "baseline/adapter_model.safetensors")
    for name, tensor in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(found[name], tensor)
    records = [json.loads((run / name / "training.json").read_text()) for name in ("adapter", "baseline")]
    # two experts of rank 2, and one LoRA of rank 4
    assert records[0]["trainable_parameters"] == records[1]["trainable_parameters"]
    assert [each["steps"] for each in records] == [8, 8]
    assert [entry["step"] for entry in records[1]["log"]] == list(range(1, 9))
    assert json.loads((run / "baseline/adapter_config.json").read_text())["r"] == 4
    # one expert gets all rows of its task: that is no load to balance
    assert not any(key.startswith("expert_load") for record in records for entry in record["log"] for key in entry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"baseline": {"lora_dropout": "none"}}, "baseline.lora_dropout is 'none'", id="a baseline"),
        pytest.param({"adapter": {"preset": "mixlora"}}, "adapter.preset is 'mixlora' with recipe", id="a mixture"),
        pytest.param({"sequential": {"order": ["gcd", "gcd"]}}, "each task once", id="twice"),
        pytest.param({"sequential": {"order": ["gcd", "spelling"]}}, "no rows; there are rows of", id="no rows"),
        pytest.param({"sequential": {"order": ["../gcd"]}}, "letters, digits", id="a path"),
        pytest.param({"sequential": {"replay": 0.5}}, "allowed: 0. Rows of earlier tasks", id="useless replay"),
        pytest.param({"sequential": {"router": "linear", "start": "mean"}}, "allowed: 'zero'", id="start of a gate"),
        pytest.param({"sequential": {"start": "best"}}, "'zero' or 'mean' or 'previous'", id="unknown start"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main([str(write_sequential(tmp_path / "a", **changes))]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a/run/stages").exists()


def test_the_shipped_configuration_runs_on_a_tiny_model(tmp_path: Path) -> None:
    tiny = load_config(write_sequential(tmp_path / "a"))
    changes = [
        f"model={tiny.model}",
        f"output_dir={tmp_path / 'out'}",
        "dtype=float32",
        "training.max_steps=1",
        "dataset.rows_per_task=8",
    ]
    file = ROOT / "configs/sequential/lora.yaml"
    assert main([str(file), *changes, "--recipe", "sequential"]) == 0
    tasks = list(load_config(file).dataset.tasks or ())
    names = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["experts"]["names"]
    assert names == tasks
    assert [path.name for path in sorted((tmp_path / "out/stages").iterdir())] == [
        f"{n}-{task}" for n, task in enumerate(tasks, 1)
    ]
