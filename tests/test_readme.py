"""The code of the README and of docs/methods.md runs, and the tables of methods and of speed are the generated ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval.speed.report import ratios
from moelora.presets.table import with_table
from tests.conftest import tiny_model

README = Path(__file__).parent.parent / "README.md"


def tiny_checkpoint(folder: Path) -> None:
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "tiny")
    rows = [{"prompt": "abc", "completion": "def"}, {"prompt": "gh", "completion": "ijk"}] * 4
    (tmp_path / "my_tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    small = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(tmp_path / "tiny")),
        "max_steps=100": "max_steps=2, report_to=[], use_cpu=True",
        "logging_steps=10": "logging_steps=1",
    }
    for original, replacement in small.items():
        assert original in code
        code = code.replace(original, replacement)

    namespace: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), namespace)

    assert (tmp_path / "my-adapter" / "adapter_config.json").exists()
    logged = [entry for entry in namespace["trainer"].state.log_history if "balance_loss" in entry]
    assert len(logged) == 2


def test_it_fits_one_screen() -> None:
    """What is longer belongs into docs, which the README links."""
    assert len(README.read_text().splitlines()) <= 110


def test_the_axes_of_the_page_of_methods() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (README.parent / "docs/methods.md").read_text(), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/methods.md", "exec"), namespace)
    assert (namespace["config"].selection.k, len(namespace["config"].balance)) == (3, 2)


def test_the_table_of_methods_is_that_of_the_presets() -> None:
    """If it fails: `moelora presets --write docs/methods.md`."""
    text = (README.parent / "docs/methods.md").read_text()
    assert with_table(text) == text


def test_the_speed_table_is_the_published_one() -> None:
    published = json.loads((README.parent / "eval/results/speed/speed.json").read_text())
    rows = ratios(published["rows"])
    assert rows
    page = (README.parent / "docs/speed.md").read_text()
    for what, model, metric, measured, _, asked, reached in rows:
        assert f"| {what} | {model} | {metric} | {measured} | {asked} | {reached} |" in page
