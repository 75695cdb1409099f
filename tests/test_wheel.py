"""What a wheel install does without the clone: it takes every command of README and docs, and runs a chain of them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.compose.loras import three_loras
from tests.installed import SITE, install, run
from tests.runs.tiny import tiny_folder
from tests.site.pages import PAGES, ROOT, blocks

CHAIN = [
    "init --model ./base --data rows.jsonl --tasks together --memory 8",
    "params run.yaml training.max_length=32",
    "train run.yaml training.max_steps=1 training.max_length=64 training.per_device_train_batch_size=2 dtype=float32"
    " training.dataloader_pin_memory=false baseline=null",
    "eval runs/run --limit 1",
    "inspect runs/run/adapter --json",
    "report runs/run",
    "compose sums=loras/sums words=loras/words --base base --router centroids --data rows.jsonl -o mix",
    "eval mix --data rows.jsonl --limit 1",
    "expert drop mix -o less --experts 1",
    "export mix served --to lora",
    "diagnose run.yaml --plan training.max_length=64 dtype=float32",
    "compare {configs}/benchmarks/rules_8.yaml --plan --no-probe model=./base dtype=float32"
    " 'methods={{lora: {{title: one, adapter: {{peft: lora, r: 2, lora_alpha: 4}}}}}}'",
    "presets mixlora",
    "doctor",
]
"""Each verb but `chat`, `push` and `completion`; test_documented_commands.py has those, too."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and nothing of the clone."""
    return install("wheel", tmp_path_factory.mktemp("wheel"))


def commands() -> list[str]:
    """The lines of README and docs that call `moelora`."""
    pages = [ROOT / "README.md", *PAGES]
    lines = "".join(block for page in pages for block in blocks(page.read_text(), "bash")).splitlines()
    return [line for line in lines if line.startswith("moelora ")]


def test_every_command_of_readme_and_docs_is_taken(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, shlex, sys, moelora_cli\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    moelora_cli.make_parser().parse_args(shlex.split(line, comments=True)[1:])\n"
        "print(moelora_cli.__file__)"
    )
    found = commands()
    assert len(found) > 50
    printed = run(installed, tmp_path, ["-c", code, json.dumps(found)])
    assert Path(printed.splitlines()[-1]).is_relative_to(installed.parents[1])


def test_a_chain_of_commands_runs(installed: Path, tmp_path: Path) -> None:
    three_loras(tmp_path / "loras")
    tiny_folder(tmp_path / "base")
    rows = [{"prompt": f"{n} ", "completion": str(n + 1), "task": ("sums", "words")[n % 2]} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = (
        "import json, sys\n"
        "from moelora_cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    assert main(words) == 0, words\n"
        "files = {name: sys.modules[name].__file__ for name in ('moelora', 'train', 'eval', 'moelora_cli')}\n"
        "print(json.dumps(files))"
    )
    chain = [shlex.split(line.format(configs=ROOT / "configs")) for line in CHAIN]
    shown = run(installed, tmp_path, ["-c", code, json.dumps(chain)])
    files = json.loads(shown.splitlines()[-1])
    site = installed.parents[1] / SITE
    assert {name: str(Path(file).parent.relative_to(site)) for name, file in files.items()} == {
        "moelora": "moelora",
        "train": "moelora/_programs/train",
        "eval": "moelora/_programs/eval",
        "moelora_cli": "moelora_cli",
    }
    assert (tmp_path / "runs/run/report.html").is_file()
    assert sorted(path.name for path in (tmp_path / "served").iterdir() if path.is_dir()) == ["sums", "words"]
    assert re.search(r"Plan +\d+ cells", shown)
