"""`moelora expert`: every edit by its command, and what goes wrong in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from moelora.compose import mean_loss
from moelora.compose.tokens import batches, tokenize
from moelora.runs.config import DatasetConfig
from moelora.runs.data import load_rows
from moelora.runs.models import load_adapter
from moelora_cli import main
from tests.compose.mixtures import saved, saved_by_sequence, weights
from tests.compose.test_split import trained_lora
from tests.runs.tiny import tiny_folder, tiny_tokenizer


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with adapters, the base model that they fit, and rows."""
    saved(tmp_path / "mixture", "mixlora")
    saved_by_sequence(tmp_path / "named")
    trained_lora(tmp_path / "lora")
    tiny_folder(tmp_path / "base")
    rows = [{"prompt": "1 2 3 ", "completion": "4"}, {"prompt": "5 6 ", "completion": "7 8"}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def expert(place: Path, words: str) -> int:
    """Run the command; `@name` is a path in the folder."""
    arguments = [str(place / word[1:]) if word.startswith("@") else word for word in words.split()]
    return main(["expert", *arguments])


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        pytest.param("add @mixture -o @out --count 2 --start mean", ("4", "6"), id="add"),
        pytest.param(
            "add @named -o @out --start two --name four --rows @rows.jsonl --base @base", ("3", "4"), id="key"
        ),
        pytest.param("drop @mixture -o @out --experts 0,2", ("4", "2"), id="drop"),
        pytest.param("drop @named -o @out --experts two", ("3", "2"), id="drop by name"),
        pytest.param("freeze @mixture -o @out --experts all", ("4", "4"), id="freeze"),
        pytest.param("freeze @mixture -o @out --experts none", ("4", "4"), id="free"),
        pytest.param("merge @mixture -o @out --to 3", ("4", "3"), id="merge"),
        pytest.param("drop @named -o @out --unused 0.34", ("3", None), id="drop the unused"),
        pytest.param("cut @mixture -o @out --rank 2", ("4", "4"), id="cut"),
        pytest.param("split @lora -o @out --num-experts 4", ("1", "4"), id="split"),
        pytest.param("split @lora -o @out --into copies --num-experts 3 --top-k 2", ("1", "3"), id="copies"),
    ],
)
def test_an_edit_prints_sizes_and_losses(
    place: Path, capsys: pytest.CaptureFixture[str], words: str, counts: tuple[str, str | None]
) -> None:
    assert expert(place, f"{words} --data @rows.jsonl --base @base") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == str(place / "out")
    table = {" ".join(line.split()[:-2]): line.split()[-2:] for line in shown[1:6]}
    assert table["experts"][0] == counts[0]
    assert table["experts"][1] == counts[1] or (counts[1] is None and table["experts"][1] in ("1", "2"))
    model = load_adapter(AutoModelForCausalLM.from_pretrained(place / "base"), str(place / "out"))
    tokenizer = tiny_tokenizer()
    rows = load_rows(DatasetConfig(files=str(place / "rows.jsonl")), tokenizer)
    loss = mean_loss(model, batches(tokenize(rows, tokenizer), 3, "cpu"))
    assert float(table["loss a token"][1]) == pytest.approx(loss, abs=2e-4)
    if words.startswith(("freeze", "split")):
        assert table["loss a token"][0] == table["loss a token"][1]


def _centroid(folder: Path) -> Tensor:
    """The centroid of the last expert."""
    return next(tensor for name, tensor in weights(folder).items() if name.endswith("centroids"))[-1]


def test_rows_of_the_new_experts_task_count(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file with a column task only those that the new expert is called by."""
    rows = [{"prompt": f"{n} {n} ", "completion": "4", "task": ("law", "tax")[n % 2]} for n in range(6)]
    tasks = {name: [row for row in rows if row["task"] == name] for name in ("law", "tax")}
    for name, part in {**tasks, "both": rows}.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    add = "add @named --base @base"
    assert expert(place, f"{add} -o @some --name law --rows @both.jsonl") == 0
    assert expert(place, f"{add} -o @all --name law --rows @law.jsonl") == 0
    assert expert(place, f"{add} -o @nameless --rows @law.jsonl") == 0
    assert expert(place, f"{add} -o @other --name tax --rows @both.jsonl") == 0
    assert _centroid(place / "some").allclose(_centroid(place / "all"))
    assert _centroid(place / "nameless").equal(_centroid(place / "all"))
    assert not _centroid(place / "other").allclose(_centroid(place / "all"), atol=1e-3)
    for name in ("", "--name four"):
        capsys.readouterr()
        assert expert(place, f"{add} -o @out {name} --rows @both.jsonl") == 1
        assert "has rows of the tasks law, tax in its column task; allowed: one of these" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_several_files_of_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss is that of one file with all their rows."""
    for name, answer in (("a", "1 2 3"), ("b", "9")):
        (place / f"{name}.jsonl").write_text(json.dumps({"prompt": "1 2 ", "completion": answer}))
    (place / "ab.jsonl").write_text((place / "a.jsonl").read_text() + "\n" + (place / "b.jsonl").read_text())
    losses = []
    for number, files in enumerate(("@a.jsonl @b.jsonl", "@ab.jsonl", "@a.jsonl")):
        assert expert(place, f"cut @mixture -o @{number} --rank 2 --base @base --data {files}") == 0
        losses.append(next(line for line in capsys.readouterr().out.splitlines() if "loss" in line).split()[-2:])
    assert losses[0] == losses[1] != losses[2]


def test_without_data_no_base_is_needed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "base")
    assert expert(place, "cut @mixture -o @out --rank 1") == 0
    shown = capsys.readouterr().out
    assert "loss" not in shown
    assert shown.splitlines()[-1] == f"  next: moelora inspect {place / 'out'}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("add @named -o @out --name two --rows @rows.jsonl --base @base", "Taken: two", id="name clash"),
        pytest.param("add @named -o @out", "the rows of 'centroids' for the new experts are not given", id="no rows"),
        pytest.param("add @mixture -o @out --rows @rows.jsonl --base @base", "'linear' scores", id="useless rows"),
        pytest.param(
            "add @named -o @out --name c --name d --rows @rows.jsonl --base ./no",
            "one --name, not c, d",
            id="two names, said before the base is looked for",
        ),
        pytest.param("add @named -o @out --count 2 --rows @rows.jsonl --base ./no", "--count 1, not 2", id="two"),
        pytest.param("add @named -o @out --rows @none.jsonl --base @base", "no file matches", id="no such rows"),
        pytest.param("merge @mixture -o @out --to 2", "allowed: with --data", id="merge without data"),
        pytest.param("drop @mixture -o @out --unused 0.1", "allowed: with --data", id="unused without data"),
        pytest.param("drop @mixture -o @out --experts seven", "no expert 'seven'", id="no such expert"),
        pytest.param("cut @lora -o @out --rank 1", "PEFT type 'LORA'", id="a LoRA is no mixture"),
        pytest.param("split @mixture -o @out --num-experts 2", "mixtures of 4 experts already", id="split a mixture"),
        pytest.param("split @lora -o @out --num-experts 3", "the divisors of the LoRA's rank", id="no divisor"),
        pytest.param("cut @mixture -o @out --rank 1 --data @rows.jsonl", "--base MODEL", id="no base"),
        pytest.param("cut @mixture -o @out --rank 1 --data @rows.jsonl --base ./no", "no model in that folder", id="?"),
    ],
)
def test_what_is_wrong_with_the_words(
    place: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    capsys.readouterr()
    assert expert(place, words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert not (place / "out").exists()
