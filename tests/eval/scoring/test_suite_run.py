"""`moelora eval ... --suite` and the wrapped `lm_eval`, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import eval.lm_eval as wrapper
import moelora
from eval.__main__ import main
from eval.scoring.model_scores import ModelScores
from tests.eval.suites.test_registry import write_task
from tests.runs.tiny import tiny_folder


def _save(base: Path, folder: Path, config: Any, seed: int) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mixture, and LoRAs of its trainable and of its active parameters."""
    root = tmp_path_factory.mktemp("adapters")
    base = tiny_folder(root / "base")
    mixture = moelora.MoeLoraConfig.from_preset("mixlora", r=24, num_experts=3, top_k=1, task_type="CAUSAL_LM")
    configs = {"mixture": mixture}
    for name, r in (("lora", 49), ("active", 24)):
        configs[name] = LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"base": base} | {
        name: _save(base, root / name, config, seed) for seed, (name, config) in enumerate(configs.items())
    }


@pytest.mark.usefixtures("commonsense")
def test_an_adapter_is_scored_beside_its_base_and_two_loras(
    adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(adapters["mixture"]), "--suite", "commonsense", "--limit", "5", "--batch-size", "8"]
    assert main([*words, "--beside", str(adapters["active"]), "--beside", str(adapters["lora"])]) == 0
    shown = capsys.readouterr().out
    assert "protocol loglik" in shown
    assert "MixLoRA - LoRA r=49" in shown
    assert "stands beside" not in shown  # both controls are there

    folder = adapters["mixture"] / "results" / "commonsense-loglik"
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "metrics.json",
        "base.json",
        "MixLoRA.json",
        "LoRA-r=49.json",
        "LoRA-r=24.json",
        "routing.json",
        "heatmaps",
    }
    mixture = ModelScores.read(folder / "MixLoRA.json")
    assert {label: len(task.values) for label, task in mixture.tasks.items()} == dict.fromkeys(mixture.tasks, 5)
    assert mixture.kind == "mixlora"
    lora = ModelScores.read(folder / "LoRA-r=49.json")
    assert abs(lora.parameters["trainable"] / mixture.parameters["trainable"] - 1) < 0.02
    assert mixture.parameters["active"] < mixture.parameters["trainable"]
    assert mixture.tokens > 1000
    assert mixture.receipt["packages"]["lm-eval"]
    assert mixture.extra["examples"]["BoolQ"]["choices"] == [" no", " yes"]
    assert mixture.tasks["ARC-e"].metrics.keys() == {"acc", "acc_norm"}
    assert "| ARC-e | acc_norm | 5 |" in (folder / "README.md").read_text()

    # an earlier result takes the place of an adapter, and another protocol never stands beside it
    earlier = ["--beside", str(folder / "LoRA-r=49.json")]
    assert main([*words, *earlier]) == 0
    assert main([*words, *earlier, "--protocol", "letters"]) == 1
    assert "numbers of different protocols are not comparable" in capsys.readouterr().err


@pytest.mark.usefixtures("commonsense")
def test_generated_answers(adapters: dict[str, Path]) -> None:
    assert main([str(adapters["lora"]), "--suite", "commonsense", "--protocol", "instruct", "--limit", "1"]) == 0
    found = ModelScores.read(adapters["lora"] / "results" / "commonsense-instruct" / "LoRA-r=49.json")
    # a random model answers nothing that can be read
    assert {task.metrics["unparsable"]["value"] for task in found.tasks.values()} == {1.0}
    assert found.tokens > 8 * 32


def test_a_task_of_the_users_own_and_the_card(
    adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_task(tmp_path)
    assert main([str(adapters["lora"]), "--suite", str(task), "--json"]) == 0
    shown = capsys.readouterr().out
    (folder,) = [each for each in (adapters["lora"] / "results").iterdir() if "my_task" in each.name]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert json.loads(shown) == metrics
    assert {"task": "my_sums (lm-eval)", "metric": "acc", "model": "base"}.items() <= metrics["scores"][0].items()
    assert metrics["receipt"]["packages"]["torch"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/adapter"], "adapter 'nowhere/adapter' cannot be read"),
        (["."], "is neither a run (no config.yaml) nor an adapter"),
    ],
)
def test_what_cannot_be_scored_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--suite", "commonsense"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("commonsense", "few_tasks_of_lm_eval")
def test_the_plain_command_with_our_adapters(adapters: dict[str, Path], tmp_path: Path) -> None:
    """`python -m eval.lm_eval` loads the mixture, and gives the numbers of `moelora eval`."""
    words = f"pretrained={adapters['base']},peft={adapters['mixture']},dtype=float32,softmax_dtype=float32"
    out = tmp_path / "out"
    arguments = ["--model", "hf", "--model_args", words, "--device", "cpu", "--tasks", "moelora_piqa,moelora_boolq"]
    wrapper.main([*arguments, "--limit", "5", "--batch_size", "8", "--output_path", str(out)])
    (file,) = out.rglob("results*.json")
    results = json.loads(file.read_text())["results"]
    loaded = AutoModelForCausalLM.from_pretrained(adapters["base"], dtype="float32")
    model = PeftModel.from_pretrained(loaded, adapters["mixture"]).eval()

    from transformers import AutoTokenizer

    from eval.scoring.scorer import Scorer
    from eval.scoring.suite_scores import score_suite
    from eval.suites.registry import load_suite

    suite = load_suite("commonsense")
    scorer = Scorer(model, AutoTokenizer.from_pretrained(adapters["base"]), batch_size=8)
    scores, _, _ = score_suite(scorer, suite, 5)
    assert results["moelora_piqa"]["acc_norm,none"] == scores["PIQA"].metrics["acc_norm"]["value"]
    assert results["moelora_boolq"]["acc,none"] == scores["BoolQ"].metrics["acc"]["value"]
