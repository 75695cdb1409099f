"""The page about routers: its code runs as it stands, on a tiny model, and no recipe is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from moelora.choices import kinds
from tests.adapters import outputs
from tests.compose.loras import save_lora, three_loras
from tests.conftest import tiny_model
from tests.test_readme import tiny_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "compose-routers.md"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _blocks(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


def test_the_routers_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each section makes the mixture that it is about, which computes something else than the base."""
    tiny_checkpoint(tmp_path / "tiny")
    three_loras(tmp_path / "loras")
    save_lora(tmp_path / "loras" / "general", 9)
    monkeypatch.chdir(tmp_path)
    first, *sections = PAGE.read_text().split("\n## ")
    namespace: dict[str, Any] = {}
    code = _blocks(first)
    assert NAME in code
    exec(compile(code.replace(NAME, "tiny"), str(PAGE), "exec"), namespace)
    scores = {}
    for section in (each for each in sections if each.startswith("`")):
        kind = section.split("`")[1]
        assert f"| `{kind}` |" in first
        exec(compile(_blocks(section), str(PAGE), "exec"), namespace)
        model = namespace.pop("model")
        assert isinstance(model, PeftModel)
        scores[kind] = model.peft_config["default"].scores.kind
        if kind not in ("task", "centroids"):
            assert not outputs(model).allclose(outputs(tiny_model()), atol=1e-3)
    assert set(scores) == set(kinds("composition"))
    assert scores["glider"] == "glider"
    assert scores["xlora"] == "classifier"
    assert (tmp_path / "my-xlora" / "0" / "adapter_model.safetensors").is_file()
    assert len(namespace["found"].names) == 2
