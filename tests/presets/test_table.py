"""The table of methods says what the presets are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelora import MoeLoraConfig, presets
from moelora.errors import ConfigError
from moelora.presets.table import BEGIN, END, HEADER, parameters_per_rank, rows, table, with_table
from moelora_cli import main
from tests.conftest import tiny_model


def test_there_is_a_row_for_each_preset_in_order() -> None:
    assert [row[0] for row in rows()] == [f"`{name}`" for name in sorted(presets.available())]
    assert {len(row) for row in rows()} == {len(HEADER)}
    assert all(cell for row in rows() for cell in row)


def test_a_row() -> None:
    row = next(row for row in rows() if row[0] == "`sira`")
    assert row == [
        "`sira`",
        "[2311.09179](https://arxiv.org/abs/2311.09179)",
        "each linear",
        "16 `lora`",
        "`linear(init_std=None)`",
        "`top_k(k=4, renormalize=False, expert_dropout=0.5, capacity_factor=1.25)`",
        "`switch(coef=0.01)`",
        "16 (in + out)",
        "abstract only",
    ]


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("lora", "in + out"), ("smora", "in + out"), ("mixlora", "8 (in + out)"), ("hydralora", "in + 4 out")],
)
def test_parameters_per_rank(name: str, phrase: str) -> None:
    assert parameters_per_rank(name) == phrase
    model = tiny_model()
    one, two = (MoeLoraConfig.from_preset(name, r=r, target_modules=["down_proj"]) for r in (64, 128))
    grown = two.num_trainable_parameters(model) - one.num_trainable_parameters(model)
    if name == "smora":
        grown -= 2 * 64 * 52  # the router has a row for each expert
    numbers = {"in": 52, "out": 36}
    value = {
        "in + out": 88,
        "8 (in + out)": 8 * 88,
        "in + 4 out": numbers["in"] + 4 * numbers["out"],
    }[phrase]
    assert grown == 2 * 64 * value


def test_what_grows_otherwise_has_no_such_number() -> None:
    """MixDA's adapters have a share of the input's features inside."""
    assert parameters_per_rank("mixda") == "not linear"
    assert parameters_per_rank("mpoe") == "in + out + 128"


def test_the_command_prints_it_and_renews_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert capsys.readouterr().out == table() + "\n"
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["presets", "--write", str(page)]) == 0
    assert page.read_text() == f"before\n{table()}\nafter\n"


def test_the_command_tells_all_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "smora"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("SMoRA (arXiv 2501.15103): `r` experts of rank one on every linear")
    assert "v = sigmoid(W_r x) + b" in page
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert "top_k 8" in lines
    assert "target_modules 'all-linear'" in lines
    assert "- `moelora init --preset smora` writes a file to train it." in lines
    assert main(["presets", "guess"]) == 1
    assert "unknown preset 'guess'" in capsys.readouterr().err


def test_the_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert sorted(found) == sorted(presets.available())
    mixlora = found["mixlora"]
    assert (mixlora["paper"], mixlora["verified_against"]) == ("2404.15159", "golden values")
    assert mixlora["words"]["num_experts"] == 8
    assert set(mixlora["words"]) | set(mixlora["peft_words"]) == set(presets.words("mixlora"))
    assert any("--to native-moe" in sentence for sentence in mixlora["advice"])
    assert any("column `task`" in sentence for sentence in found["moelora_task"]["advice"])
    assert any("mixture of experts itself" in sentence for sentence in found["perft_r"]["advice"])
    assert "abstract" in found["sira"]["advice"][0]
    assert all(each["advice"] and each["description"] for each in found.values())


def test_a_page_without_the_comments_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="0 tables of methods"):
        with_table("nothing here")
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text(f"{BEGIN}\n{END}")
    other.write_text("none")
    assert main(["presets", "--write", str(page), str(other)]) == 1
    assert "0 tables of methods" in capsys.readouterr().err
    assert page.read_text() == f"{BEGIN}\n{END}"
