"""docs/share.md runs as it stands, on tiny models and the loopback Hub, whose user is called tester."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel

from moelora_cli import main
from tests.hub_server import HubServer
from tests.share.folders import base, base_on_hub, distilled, edited, logits, loras, mixlora, native

PAGE = (Path(__file__).parents[2] / "docs" / "share.md").read_text().replace("me/", "tester/")


def test_share(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base_on_hub(tmp_path / "base")
    mixture = loras(tmp_path / "a")[1]
    (tmp_path / "a/composition").rename("mix")
    (tmp_path / "a/my loras").rename("my-loras")
    edited(tmp_path / "b")[0].rename("mix-2")
    distilled(tmp_path / "c")[0].rename("one-lora")
    native(tmp_path / "d")[0].rename("my-moe")
    mixlora_folder, adapter = mixlora(tmp_path / "e")
    mixlora_folder.rename("for-mixlora")
    assert main(["push", "e/adapter", "tester/adapter"]) == 0
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "bash"]
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "share.md", "exec"), {})
            continue
        for line in block.splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "moelora"
            assert main(words) == 0, line
    card = ModelCard(hub.files("tester/mix")["README.md"].decode()).data.to_dict()
    assert (card["license"], card["datasets"]) == ("apache-2.0", ["tester/rows"])
    table = re.findall(r"^\| .*? \| .*? \| `(\w+)` \|$", PAGE, flags=re.MULTILINE)
    repos = ("mix", "my-loras", "one-lora", "my-moe", "for-mixlora")
    cards = [ModelCard(hub.files(f"tester/{name}")["README.md"].decode()).data.to_dict() for name in repos]
    assert ["library_name", *(words["library_name"] for words in cards)] == table
    from_mixlora = PeftModel.from_pretrained(base(), "my-adapter")
    torch.testing.assert_close(logits(from_mixlora), logits(adapter), atol=1e-5, rtol=1e-5)
    assert Path("for-mixlora-again/adapter_model.bin").is_file()
    names = ("maths", "code-words", "prose")
    again = [logits(PeftModel.from_pretrained(base(), f"loras-again/{name}")) for name in names]
    assert any(torch.allclose(found, logits(mixture), atol=1e-5) for found in again)
    assert Path("one-again/adapter_model.safetensors").is_file()
