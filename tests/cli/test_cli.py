"""The command `moelora`."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model

import moelora
from moelora import MoeLoraConfig
from moelora.version import FORMAT_VERSION
from moelora_cli import main
from tests.conftest import tiny_model
from tests.hub_server import HubServer
from tests.runs.tiny import write_run


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A saved adapter that records a base model's name."""
    config = MoeLoraConfig.from_preset("mixlora", r=4, num_experts=5, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    model.peft_config["default"].base_model_name_or_path = "tester/base"
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_inspect_prints_what_an_adapter_is(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter)]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    for expected in (
        "preset mixlora",
        "base model tester/base",
        "task type CAUSAL_LM",
        # 2 layers: 5 experts of rank 4 on gate, up (36 -> 52) and down (52 -> 36), a router 5 x 36, and LoRA of rank 4
        # on q, o (36 -> 36) and k, v (36 -> 18): 2 * (3 * 5 * 4 * 88 + 180 + 4 * (2 * 72 + 2 * 54)) = 12,936
        "parameters 12,936 stored, 12,936 trainable",
        "size 51,744 bytes, F32",
        "model.layers.*.mlp 0-1 2 10,920 10,920 mixture of 5 feed-forward experts (gate, up, down)",
        "model.layers.*.self_attn.k_proj 0-1 2 432 432 plain LoRA",
    ):
        assert expected.split() in words, expected
    axes = {line[0]: " ".join(line[1:]) for line in words if line}
    assert "num_experts=5, r=4" in axes["experts"]
    assert axes["scores"].startswith("linear(activation=softmax")
    assert axes["selection"].startswith("top_k(k=2, ")
    assert "coef=0.01" in axes["balance"]
    assert f"moelora {moelora.__version__}, format {FORMAT_VERSION}" in axes["written"]


def test_inspect_as_json(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["preset"], found["base_model"], found["bytes"]) == ("mixlora", "tester/base", 51_744)
    assert found["parameters"] == {"stored": 12_936, "trainable": 12_936}
    assert [site["count"] for site in found["sites"]] == [2] * 5


def test_params_say_what_a_run_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()  # no weight is read
    assert main(["params", str(run), "adapter.num_experts=5", "--length", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["trainable"] > found["parameters"]["active"] > 0
    assert sum(found["memory"].values()) == 2 * found["memory"]["sum"]
    assert (found["sequences"], found["length"]) == (2, 32)
    assert main(["params", str(run), "adapter.num_experts=5", "--length", "32"]) == 0
    page = capsys.readouterr().out
    assert f"mixlora: {found['parameters']['trainable']:,} trainable parameters" in page
    assert f"Operations of an optimizer step on 2 x 32 tokens: {found['flops']:.3g}" in page
    assert main(["params", str(run), "--model", "./none"]) == 1
    assert "no model in that folder" in capsys.readouterr().err


def test_inspect_reads_from_the_hub(hub: HubServer, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().push_to_hub("tester/base")
    assert main(["push", str(adapter), "tester/adapter"]) == 0
    capsys.readouterr()
    main(["inspect", str(adapter)])
    local = capsys.readouterr().out
    main(["inspect", "tester/adapter"])
    assert capsys.readouterr().out == local.replace(str(adapter), "tester/adapter")


def test_push_prints_where_the_adapter_is(hub: HubServer, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().push_to_hub("tester/base")
    options = ["--private", "--license", "mit", "--dataset", "tester/a", "--dataset", "tester/b", "--message", "First"]
    assert main(["push", str(adapter), "tester/adapter", *options]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/tester/adapter/commit/")
    assert hub.repos["tester/adapter"].private
    card = ModelCard(hub.files("tester/adapter")["README.md"].decode()).data.to_dict()
    assert card["license"] == "mit"
    assert card["datasets"] == ["tester/a", "tester/b"]
    assert card["base_model"] == "tester/base"
    assert main(["push", str(adapter), "tester/adapter", "--create-pr"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/tester/adapter/discussions/1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["inspect", "tester/none"], "there is no such repository", id="missing repository"),
        pytest.param(["inspect", "./none"], "there is no folder './none'", id="missing folder"),
        pytest.param(
            ["push", "ADAPTER", "tester/adapter", "--token", "wrong"], "the token was refused", id="bad token"
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    hub: HubServer, adapter: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(adapter) if word == "ADAPTER" else word for word in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"moelora {arguments[0]}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_damaged_configuration_is_an_error(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["selection"]["topk"] = 3
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert main(["inspect", str(adapter)]) == 1
    assert "topk" in capsys.readouterr().err
    (adapter / "adapter_config.json").write_text("{")
    assert main(["inspect", str(adapter)]) == 1
    assert "not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["push", "x"], ["inspect", "x", "--what"], ["guess"]])
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: moelora" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"moelora {moelora.__version__}\n"


def test_the_installed_command_is_main() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["moelora"].partition(":")
    assert getattr(importlib.import_module(module), function) is main
