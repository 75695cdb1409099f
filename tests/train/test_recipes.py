"""Every shipped recipe runs on a tiny model, and its first step is what theory says of an adapter with B = 0."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from moelora.runs.config import DatasetConfig, load_config
from moelora.runs.data import load_rows
from moelora.runs.recipes import RECIPES
from moelora.runs.tasks import problems
from tests.conftest import tiny_model
from tests.runs.tiny import tiny_folder, tiny_tokenizer, write_run
from train.__main__ import main
from train.grpo import reward_of

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "recipes"
LN_2 = pytest.approx(math.log(2), abs=1e-5)
NOTHING = pytest.approx(0, abs=1e-6)
# TRL's own, on the paths of its experimental trainers
QUIET = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, two with heads of zeros, and an encoder-decoder."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    tiny_folder(root / "llama")
    for name, labels in (("reward", 1), ("classification", 2)):
        model = AutoModelForSequenceClassification.from_pretrained(root / "llama", num_labels=labels)
        model.score.weight.data.zero_()
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    tiny_t5().save_pretrained(root / "seq2seq")
    tokenizer.save_pretrained(root / "seq2seq")
    return root


def tiny_t5() -> Any:
    return tiny_model("t5", vocab_size=len(tiny_tokenizer()), eos_token_id=1, dropout_rate=0.0)


def of_model(models: Path, recipe: str) -> Path:
    return models / recipe if (models / recipe).exists() else models / "llama"


def tiny_run(recipe: str, models: Path, folder: Path, adapter: str = "adapter.r=2") -> list[str]:
    """Two steps of a shipped configuration, with all eight rows in each."""
    tiny = ["dtype=float32", "dataset.rows_per_task=4", adapter, "training.max_steps=2"]
    tiny += ["training.logging_steps=1", "training.per_device_train_batch_size=8"]
    tiny += ["training.dataloader_pin_memory=false", f"model={of_model(models, recipe)}", f"output_dir={folder}"]
    return [str(CONFIGS / f"{recipe}.yaml"), *tiny]


def trained(recipe: str, models: Path, folder: Path, *changes: str) -> list[dict[str, Any]]:
    """What they log."""
    assert main([*tiny_run(recipe, models, folder), *changes]) == 0
    assert not (folder / "adapter" / "ref").exists()  # TRL's reference, which is no result
    log: list[dict[str, Any]] = json.loads((folder / "adapter" / "training.json").read_text())["log"]
    assert len(log) == 2
    for entry in log:
        assert entry["balance_loss"] > 0.9
        entry["task_loss"] = entry["loss"] - 0.01 * entry["balance_loss"]
    return log


@QUIET
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("dpo", {"task_loss": LN_2, "rewards/margins": NOTHING}),
        # each answer's loss is 1 - sigmoid(0)
        (
            "kto",
            {"task_loss": pytest.approx(0.5), "rewards/chosen": NOTHING, "rewards/rejected": NOTHING, "kl": NOTHING},
        ),
        ("reward", {"task_loss": LN_2, "margin": NOTHING}),
        ("classification", {"task_loss": LN_2}),
    ],
)
def test_the_first_step(recipe: str, expected: dict[str, Any], models: Path, tmp_path: Path) -> None:
    first, second = trained(recipe, models, tmp_path)
    for name, value in expected.items():
        assert first[name] == value, name
    assert second["task_loss"] != first["task_loss"]
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    classes = ["chain_sum", "word_sequence_reversal"] if recipe == "classification" else None
    assert record.get("classes") == classes


@QUIET
def test_dpo_of_a_trained_adapter_resumes_bit_exactly(models: Path, tmp_path: Path) -> None:
    """Its reference is the adapter as it was, also after a stop."""
    trained("dpo", models, tmp_path / "first", "training.learning_rate=1e-2")
    words = tiny_run("dpo", models, tmp_path / "run", f"adapter={{path: {tmp_path / 'first' / 'adapter'}}}")
    words += ["training.save_steps=1", "training.learning_rate=1e-2"]
    assert main(words) == 0
    adapter = tmp_path / "run" / "adapter"
    log = json.loads((adapter / "training.json").read_text())["log"]
    assert log[0]["rewards/margins"] == NOTHING
    assert log[1]["rewards/margins"] != NOTHING
    expected = load_file(adapter / "adapter_model.safetensors")
    shutil.rmtree(adapter)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "adapter" / "checkpoint-2")
    assert main(words) == 0
    record = json.loads((adapter / "training.json").read_text())
    assert record["resumed_from"] == "checkpoint-1"
    assert record["log"][1]["rewards/margins"] == log[1]["rewards/margins"]
    found = load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())


@QUIET
def test_grpo_is_rewarded_by_the_verifiers(models: Path, tmp_path: Path) -> None:
    words = ["training.num_generations=4", "training.max_completion_length=4", "training.beta=0.1"]
    first, _ = trained("grpo", models, tmp_path, *words)
    assert first["kl"] == NOTHING
    # four random bytes are no right answer, and without rewards there is nothing to learn
    assert first["rewards/verified/mean"] == 0
    assert first["task_loss"] == NOTHING


def test_seq2seq_has_the_cross_entropy_of_the_completions(models: Path, tmp_path: Path) -> None:
    first, _ = trained("seq2seq", models, tmp_path)
    config = load_config(tmp_path / "config.yaml")
    model, tokenizer = tiny_t5(), tiny_tokenizer()
    total, count = 0.0, 0
    for row in load_rows(config.dataset, tokenizer, "seq2seq"):
        prompt, answer = (torch.tensor([tokenizer(row[key])["input_ids"]]) for key in ("prompt", "completion"))
        labels = torch.cat([answer, torch.tensor([[1]])], dim=1)
        with torch.no_grad():
            total += model(input_ids=prompt, labels=labels).loss.item() * labels.numel()
        count += labels.numel()
    assert first["task_loss"] == pytest.approx(total / count, rel=1e-4)


@QUIET
def test_orpo_runs(models: Path, tmp_path: Path) -> None:
    """Its formula is in tests/training/test_preference_trainers.py."""
    assert all(entry["task_loss"] > 0 for entry in trained("orpo", models, tmp_path))


def test_the_reward_is_the_verifiers_score() -> None:
    config = DatasetConfig(tasks={"gcd": {"max_value": 30}}, rows_per_task=3)
    found = list(problems("gcd", {"max_value": 30}, seed=0, size=3))
    prompts = [[{"role": "user", "content": problem.prompt}] for problem in found]
    answers = [found[0].answer, " " + found[1].answer + "\n", "no number"]
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    reward = reward_of(config)
    assert reward(prompts=prompts, completions=completions, task=["gcd"] * 3) == [1.0, 1.0, 0.0]
    exact = reward_of(DatasetConfig(files="rows.jsonl"))
    assert exact(prompts=["a", "b"], completions=["x ", "y"], answer=["x", "x"]) == [1.0, 0.0]


def test_the_page_has_a_line_for_every_recipe() -> None:
    page = (CONFIGS.parent.parent / "docs" / "recipes.md").read_text()
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert lines.keys() == RECIPES.keys()
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == RECIPES.keys() - {"sft", "sequential"}
    for name, recipe in RECIPES.items():
        assert f"`{recipe.arguments.rpartition('.')[2]}`" in lines[name]
        assert all(f"`{column}`" in lines[name] for column in recipe.forms[0])


ROWS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": "p", "completion": "c"},
    "dpo": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "kto": {"prompt": "p", "completion": "c", "label": True},
    "orpo": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "grpo": {"prompt": "p", "answer": "a"},
    "reward": {"chosen": "c", "rejected": "r"},
    "seq2seq": {"prompt": "p", "completion": "c"},
    "classification": {"text": "t", "label": "good"},
}


@pytest.mark.parametrize(
    ("recipe", "wrong", "message"),
    [
        ("sft", {"completion": None}, r"completion of row 2 of \S*b.jsonl is missing"),
        ("dpo", {"rejected": None}, r"rejected of row 2 of \S*b.jsonl is missing"),
        ("dpo", {"chosen": " "}, r"chosen of row 2 of \S*b.jsonl is ' '; needed: a text that is not blank"),
        ("kto", {"label": None}, r"label of row 2 of \S*b.jsonl is missing"),
        ("kto", {"label": 3}, r"label of row 2 of \S*b.jsonl is 3; needed: true or false"),
        ("grpo", {"answer": ""}, r"answer of row 2 of \S*b.jsonl is ''; needed: a text"),
        ("classification", {"label": " "}, r"label of row 2 of \S*b.jsonl is ' '; needed: a class"),
    ],
)
def test_a_wrong_value_is_named(recipe: str, wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {**ROWS[recipe], **({"label": 1} if wrong.get("label") == 3 else {})}
    for name, rows in (("a", [good]), ("b", [good, {**good, **wrong}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = partial(load_rows, tokenizer=tiny_tokenizer(), recipe=recipe)
    assert len(load(DatasetConfig(files=str(tmp_path / "a.jsonl")))) == 1
    with pytest.raises(Exception, match=message):
        load(DatasetConfig(files=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]))


def test_preferences_with_whole_chats_keep_them(tmp_path: Path) -> None:
    """As in UltraFeedback: the prompt is a text, and also the first message of both chats."""
    chats = {
        key: [{"role": "user", "content": "p"}, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", **chats}) + "\n")
    config = DatasetConfig(files=str(tmp_path / "rows.jsonl"))
    assert load_rows(config, tiny_tokenizer(), "dpo")[0] == chats


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_refuses(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_run(tmp_path))
    assert main([file, f"recipe={recipe}", "training.max_step=3"]) == 1
    assert "unknown key 'max_step' in training. Did you mean 'max_steps'?" in capsys.readouterr().err
    fits = ["training.per_device_train_batch_size=8"]  # a group of GRPO
    wrong = "SEQ_CLS" if RECIPES[recipe].task_type == "CAUSAL_LM" else "CAUSAL_LM"
    assert main([file, f"recipe={recipe}", f"adapter.task_type={wrong}", *fits]) == 1
    assert f"the adapter's task_type is {wrong!r} with recipe {recipe!r}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_errors_of_recipes_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_run(tmp_path))
    assert main([file, "recipe=grpo", "training.use_vllm=true"]) == 1
    assert "training.use_vllm is True; allowed: false." in capsys.readouterr().err
    by_task = ["adapter={preset: poly, num_tasks: 2}", "training.per_device_train_batch_size=8"]
    assert main([file, "recipe=grpo", *by_task]) == 1
    assert "'poly' routes or balances by the task, and GRPO" in capsys.readouterr().err
    assert main([file, "recipe=kto", "training.per_device_train_batch_size=1"]) == 1
    assert capsys.readouterr().err.startswith("error: training: ")
    assert main([file, "recipe=seq2seq", "dataset.system=null", "--restart"]) == 1
    assert "has a LlamaConfig, of which there is no AutoModelForSeq2SeqLM" in capsys.readouterr().err


@pytest.mark.real_model
def test_grpo_on_the_real_model(tmp_path: Path) -> None:
    """Two steps; in one of them answers of a group earn different rewards, so that there is something to learn."""
    words = [
        "dtype=float32",
        f"output_dir={tmp_path}",
        "dataset.rows_per_task=8",
        "adapter.r=2",
        "adapter.num_experts=2",
    ]
    words += ["model_kwargs.attn_implementation=eager", "training.max_steps=2", "training.logging_steps=1"]
    words += ["training.per_device_train_batch_size=8", "training.max_completion_length=16"]
    assert main([str(CONFIGS / "grpo.yaml"), *words, "training.save_strategy=no"]) == 0
    log = json.loads((tmp_path / "adapter" / "training.json").read_text())["log"]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert all(0 <= entry["rewards/verified/mean"] <= 1 for entry in log)
    assert all(math.isfinite(entry["loss"]) for entry in log)
    assert any(entry["reward_std"] > 0 and entry["grad_norm"] > 0.1 for entry in log), log
