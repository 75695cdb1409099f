"""The pages of docs/, their blocks of code, and a folder of tiny things that their names stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.compose.loras import three_loras
from tests.runs.tiny import tiny_folder

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(text: str, language: str) -> list[str]:
    """The blocks of a language."""
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return found


def tiny_world(folder: Path) -> None:
    """What the pages name, in tiny: a base model, LoRAs of it, rows."""
    tiny_folder(folder / "tiny")
    three_loras(folder / "loras")
    rows = [{"prompt": "What is 3 + 4?", "completion": " 7", "task": "sums"}]
    rows.append({"prompt": "Spell cat.", "completion": " c a t", "task": "words"})
    (folder / "my_tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))


STAND_INS = {
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': '"tiny"',
    "max_steps=100": "max_steps=1, report_to=[], use_cpu=True",
    "logging_steps=10": "logging_steps=1",
    "per_device_train_batch_size=8": "per_device_train_batch_size=2",
}
"""As in the README's test: what is real on a page, and what stands for it here."""


def runnable(text: str) -> str:
    """All Python blocks of a page as one program, on tiny things."""
    code = "\n".join(blocks(text, "python"))
    for original, replacement in STAND_INS.items():
        code = code.replace(original, replacement)
    return code
