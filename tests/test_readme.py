"""The README's code runs as it stands, on a tiny model in place of the real one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moelora
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
    pushed: list[Any] = []
    monkeypatch.setattr(moelora, "push_to_hub", lambda *args: pushed.append(args), raising=False)

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    code = "\n".join(blocks[1:])  # the first only shows the idea; the guide repeats it with a model
    assert "from_preset" in blocks[0]
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

    assert pushed == [(namespace["model"], "me/my-adapter")]
    assert (tmp_path / "my-adapter" / "adapter_config.json").exists()
    logged = [entry for entry in namespace["trainer"].state.log_history if "balance_loss" in entry]
    assert len(logged) == 2
    assert len(namespace["terms"]) == len(namespace["balance"]) == 2
    assert namespace["loss"].isfinite()
    assert namespace["loss"].requires_grad
    assert len(namespace["recorder"].records) == tiny_model("llama").config.num_hidden_layers


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_the_table_of_methods_is_that_of_the_presets(page: str) -> None:
    """If it fails: `moelora presets --write README.md docs/methods.md`."""
    text = (README.parent / page).read_text()
    assert with_table(text) == text


def test_the_speed_table_is_the_published_one() -> None:
    published = json.loads((README.parent / "eval/results/speed/speed.json").read_text())
    rows = ratios(published["rows"])
    assert rows
    for what, model, metric, measured, _, asked, reached in rows:
        assert f"| {what} | {model} | {metric} | {measured} | {asked} | {reached} |" in README.read_text()
