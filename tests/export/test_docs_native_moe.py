"""The page on native MoE exports runs as it stands, and its table is that of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moelora.export.native_moe.targets import ROWS
from moelora_cli import main
from tests.export.bases import TARGETS, make_base, observed, save_pair

PAGE = (Path(__file__).parents[2] / "docs" / "export-native-moe.md").read_text()


def test_the_code_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_pair(tmp_path, "smollm2")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "of": 2, "is": 3, "a": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "my-base")
    (tmp_path / "base").symlink_to(tmp_path / "my-base")  # as the adapter names it
    (tmp_path / "adapter").rename(tmp_path / "my-adapter")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL):
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "moelora"
            assert main(arguments) == 0
    printed = capsys.readouterr().out
    shown = re.search(r"\n    my-moe\n(.*?)\n\n", PAGE, flags=re.DOTALL)
    assert shown is not None
    for label in re.findall(r"^      (\S.*?)  ", shown[1], flags=re.MULTILINE):
        assert f"\n  {label} " in printed, label

    namespace: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(block, "export-native-moe.md", "exec"), namespace)
    assert (observed(model)["logits"] - observed(namespace["native"].eval())["logits"]).abs().max() < 1e-4


def test_the_table_has_every_row() -> None:
    table = dict(re.findall(r"^\| (`.*?) \| (\w+) \|", PAGE, flags=re.MULTILINE))
    named = {name: target for words, target in table.items() for name in re.findall(r"`(\w+)`", words)}
    assert set(ROWS) <= set(named)
    for row, architecture in TARGETS.items():
        base = make_base(row).config
        found = {
            target
            for words, target in table.items()
            if f"`{base.model_type}`" in words
            and ("attention_bias" in words) == (base.model_type == "llama" and base.attention_bias)
        }
        assert {f"{target}ForCausalLM" for target in found} == {architecture}, row
