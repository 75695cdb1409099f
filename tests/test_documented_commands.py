"""Every command that README, docs and notebooks show runs from an installed wheel, and from an installed sdist.

The names on the pages stand for tiny things: `NAMES` says for each page which ones it finds in its folder, `MORE` which
words make a verb short. `make release` runs the commands; that each has its place is tested always. What needs a
clone is tested elsewhere: `make`, `pip`, `torchrun`, and the programs under `python -m`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from moelora_cli import make_parser
from tests.compose.loras import save_lora, three_loras
from tests.conftest import HUB
from tests.eval.compare.tiny import write_benchmark
from tests.eval.suites.test_registry import write_task
from tests.eval.tiny_suite import write_rows
from tests.hub_server import File, HubServer, Repo
from tests.installed import install, run
from tests.runs.tiny import tiny_folder
from tests.site.pages import DOCS, PAGES, ROOT, blocks

BASE = "tester/base"
SHORT = "training.max_steps=1 training.max_length=256 training.per_device_train_batch_size=2 dtype=float32"
SHORT += " training.gradient_accumulation_steps=1 training.dataloader_pin_memory=false"

KIT = [
    f"moelora train run.yaml {SHORT}",
    f"moelora train seq.yaml {SHORT}",
    f"moelora train problems.yaml {SHORT}",
    f"moelora compose sums=loras/sums words=loras/words --base {BASE} --router centroids --data rows.jsonl -o mix",
    "moelora expert drop mix -o mix-2 --experts 1",
    "moelora export mix my-loras --to lora",
    "moelora export runs/run/adapter one-lora --to lora --rank 2",
    "moelora export runs/run/adapter my-moe --to native-moe",
    "moelora export runs/run/adapter for-mixlora --to mixlora",
    "moelora push runs/run/adapter tester/adapter",
]
"""What makes the adapters that the pages name, of three LoRAs and rows."""

RUN, ADAPTER, ROWS = "runs/run", "runs/run/adapter", "rows.jsonl"
NAMES: dict[str, dict[str, str]] = {
    "README": {"my_tasks.jsonl": ROWS},
    "start": {"my_tasks.jsonl": ROWS, "my-adapter": ADAPTER},
    "command-line": {
        "run.yaml": "run.yaml",
        "runs/run": RUN,
        "runs/one": RUN,
        "runs/other": "runs/seq",
        "ADAPTER": ADAPTER,
        "rows.jsonl": ROWS,
        "comparison.yaml": "benchmark.yaml",
    },
    "after-training": {
        "loras": "loras",
        "base": "base",
        "rows.jsonl": ROWS,
        "unseen.jsonl": ROWS,
        "facts.jsonl": "facts.jsonl",
        "LORA": "loras/sums",
    },
    "diagnose": {"run.yaml": "problems.yaml"},
    "edit-experts": {
        "mixture": ADAPTER,
        "lora": "lora",
        "by-centroid": "mix",
        "base": "base",
        "rows.jsonl": ROWS,
        "legal.jsonl": "legal.jsonl",
    },
    "evaluation": {
        "runs/mine": RUN,
        "runs/quickstart": "runs/problems",
        "runs/one": RUN,
        "runs/other": "runs/problems",
        "runs/seq": "runs/seq",
        "my-mixture": "mix",
        "my-lora": "loras/sums",
        "my-adapter": ADAPTER,
        "rows.jsonl": ROWS,
        "unseen.jsonl": ROWS,
        "configs/benchmarks/commonsense.yaml": "benchmark.yaml",
    },
    "export-loras": {"my-mixture": "mix", "my-adapter": ADAPTER, "rows.jsonl": ROWS},
    "export-native-moe": {"my-adapter": ADAPTER, "my-base": "base"},
    "faq": {"FOLDER": ADAPTER},
    "methods": {"FILE": "methods.md"},
    "mixlora-folders": {"alpaca-mixlora": "for-mixlora"},
    "recipes": {"configs/recipes/dpo.yaml": "dpo.yaml"},
    "sequential": {"run.yaml": "seq.yaml"},
    "share": {
        **{name: name for name in ("mix", "mix-2", "my-loras", "one-lora", "my-moe", "for-mixlora")},
        "FOLDER": ADAPTER,
    },
    "when-to-use": {"run.yaml": "problems.yaml"},
    "3_export": {"my-mixture": ADAPTER, "rows.jsonl": ROWS},
}
"""Page to what the names on it stand for, in the folder that the kit was made in."""

MORE = {
    "train": SHORT,
    "diagnose": SHORT,
    "chat": "--max-new-tokens 3",
    "eval": "evaluation.max_new_tokens=3",
    "init": "-o run-of-init.yaml",
}
"""What is added to a verb."""
INSTEAD = {
    "me/": "tester/",
    "OWNER/NAME": "tester/mixture",
    "arc_easy": str(Path("..") / "my_task.yaml"),
    "--limit 400": "--limit 2",
    "evaluation.max_new_tokens=3 --suite": "--suite",
}
"""What stands for parts of a command."""
TYPED = {
    "init": f"{BASE}\n../rows.jsonl\ntogether\n8\n",
    "chat": "What is 3 + 4?\n/off\nAnd 4 + 3?\n/new\n/quit\n",
}
"""What a user types."""
NAMED_ONLY = {"moelora compose", "moelora compose --router centroids"}
"""What the parser takes, but is only named on a page: LoRAs are missing."""

RUNNER = """
import io, json, os, shlex, subprocess, sys, time, traceback
from moelora_cli import main
failed = []
for place, line, typed in json.loads(open(sys.argv[1]).read()):
    os.chdir(place)
    words = shlex.split(line)
    sys.stdin = io.StringIO(typed)
    sys.stdin.isatty = lambda: words[1] == "init"  # which asks only there
    print(f"{os.path.basename(place)} $ {line}", flush=True)
    began = time.monotonic()
    try:
        status = main(words[1:]) if words[0] == "moelora" else subprocess.run([sys.executable, *words[1:]]).returncode
    except SystemExit as stopped:
        status = stopped.code
    except Exception:  # a traceback is what no command may end in; it is listed, and the others still run
        status = traceback.format_exc()
    print(f"status {status} after {time.monotonic() - began:.1f} s", flush=True)
    if status:
        failed.append(f"{place}: {line}: {status}")
sys.exit("\\n".join(failed) or 0)
"""


def documented() -> Iterator[tuple[str, str]]:
    """Each command of a page once, those of blocks first, with the page's name."""
    texts = {page.stem: page.read_text() for page in [ROOT / "README.md", *PAGES]}
    for notebook in sorted((DOCS / "notebooks").glob("*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        texts[notebook.stem] = "\n".join("".join(cell["source"]) for cell in cells)
    in_blocks = set()
    for page, text in texts.items():
        lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
        for line in (shlex.join(shlex.split(line, comments=True)) for line in lines):
            if line.startswith("moelora ") or re.match(r"python \S+\.py", line):
                in_blocks.add(line)
                yield page, line
    done = {*in_blocks, *NAMED_ONLY}
    for page, text in texts.items():
        for line in re.findall(r"`(moelora [^`\n]+)`", text):
            if line not in done and is_whole(line):
                done.add(line)
                yield page, line


def is_whole(line: str) -> bool:
    """Whether a command has all the words that it needs, as against one that is only named."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            make_parser().parse_args(shlex.split(line)[1:])
        except SystemExit as stopped:
            return stopped.code == 0
    return True


def tiny(page: str, line: str) -> str:
    """A documented command with tiny things in place of real ones."""
    program, verb, *_ = line.split()
    if program == "moelora" and not (page == "README" and verb == "init") and "--plan" not in line:
        line = f"{line} {MORE.get(verb, '')}".strip()
    if verb == "eval" and "--suite" in line:
        line = line.replace(f" {MORE['eval']}", "")
    for original, replacement in INSTEAD.items():
        line = line.replace(original, replacement)
    return line


def test_each_command_has_its_place() -> None:
    """A command that is new on a page has to be run too, with names that stand for something."""
    found = list(documented())
    assert {page for page, _ in found} == NAMES.keys()
    assert len(found) > 80
    assert {line.split()[1] for _, line in found if line.startswith("moelora ")} >= VERBS
    for page, line in found:
        assert line.startswith("python ") or is_whole(tiny(page, line)), line


VERBS = {
    *("init", "params", "train", "eval", "compare", "diagnose", "chat", "inspect", "report", "compose", "expert"),
    *("export", "push", "presets", "doctor", "completion"),
}


def write_kit(place: Path) -> None:
    """What the commands need that they do not make themselves; the base model is on the Hub too."""
    tiny_folder(place / "base")
    repo = HUB.repos[BASE] = Repo(private=False)
    repo.commit("main", {file.name: _file(file) for file in (place / "base").iterdir()})
    three_loras(place / "loras")
    save_lora(place / "lora", 3, r=8, lora_alpha=16)
    rows = {
        task: [{"prompt": f"{ask} {n}?", "completion": f" {n + 1}", "task": task} for n in range(12)]
        for task, ask in {"sums": "What is 1 +", "words": "Spell the word"}.items()
    }
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows["sums"], *rows["words"]])))
    facts = [{"prompt": f"Where is the river {n}?", "completion": " here", "task": "facts"} for n in range(4)]
    (place / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    without_task = [{"prompt": f"May I do {n}?", "completion": " no"} for n in range(4)]
    (place / "legal.jsonl").write_text("\n".join(map(json.dumps, without_task)))
    adapter = {"preset": "mixlora", "r": 2, "lora_alpha": 4, "num_experts": 4, "top_k": 2}
    of_rows: dict[str, Any] = {"model": BASE, "dataset": {"files": str(place / "rows.jsonl"), "held_out": 0.2}}
    tasks = {"gcd": {"max_value": 300}, "letter_counting": {"min_words": 2, "max_words": 3}}
    runs: dict[str, dict[str, Any]] = {
        "run": {**of_rows, "adapter": adapter, "baseline": {"r": 4}},
        "seq": {
            **of_rows,
            "recipe": "sequential",
            "sequential": {"order": ["sums", "words"]},
            "adapter": {"preset": "lora", "r": 2},
        },
        "problems": {
            "model": BASE,
            "dataset": {"tasks": tasks, "rows_per_task": 24, "system": "Reply."},
            "adapter": adapter,
            "evaluation": {"rows_per_task": 3},
        },
    }
    for name, words in runs.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({**words, "output_dir": f"runs/{name}"}))
    preferences = yaml.safe_load((ROOT / "configs/recipes/dpo.yaml").read_text())
    preferences |= {"model": BASE, "dataset": {"tasks": tasks, "rows_per_task": 4}}
    (place / "dpo.yaml").write_text(yaml.safe_dump(preferences))
    changes: dict[str, Any] = {
        "selection": {"learning_rates": [0.01]},
        "data": {"tasks": ["arc_easy"], "rows_per_task": 8, "selection_rows": 2, "steps": 2},
    }
    write_benchmark(place, **changes)
    write_task(place)
    write_rows(place / "commonsense")
    shutil.copy(DOCS / "methods.md", place)


def prepare(kit: Path) -> list[tuple[str, str, str]]:
    """Make the folder of each page; its commands with their folders and what is typed."""
    for page, names in NAMES.items():
        for name, source in names.items():
            place = kit / "pages" / page / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (kit / source).is_dir() else shutil.copy)(kit / source, place)
    for name in ("my_task.yaml", "my_rows.py", "rows.jsonl"):
        shutil.copy(kit / name, kit / "pages")
    (block,) = blocks((DOCS / "start.md").read_text(), "yaml")
    (kit / "pages/start/run.yaml").write_text(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", BASE))
    return [
        (str(kit / "pages" / page), tiny(page, line), TYPED.get(line.split()[1], "")) for page, line in documented()
    ]


def _file(file: Path) -> File:
    return File(file.read_bytes(), lfs=file.suffix == ".safetensors")


@pytest.fixture(params=["wheel", "sdist"])
def python(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The Python of an environment with moelora and nothing of the clone."""
    kind: Literal["wheel", "sdist"] = request.param
    return install(kind, tmp_path)


@pytest.mark.release
def test_every_command_runs(python: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    write_kit(kit)
    monkeypatch.setenv("MOELORA_DATA_DIR", str(kit / "commonsense"))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([(str(kit), line, "") for line in KIT]))
    run(python, tmp_path, ["-c", RUNNER, str(plan)])

    lines = prepare(kit)
    plan.write_text(json.dumps(lines))
    shown = run(python, tmp_path, ["-c", RUNNER, str(plan)])
    assert len(re.findall(r"^status 0 after", shown, flags=re.MULTILINE)) == len(lines)
    assert {"tester/mix", "tester/my-moe", "tester/mixture"} <= hub.repos.keys()
    assert (kit / "pages/README/run.yaml").is_file()
    assert (kit / "pages/evaluation/comparison.html").is_file()
    assert run(python, tmp_path, [str(python.with_name("moelora")), "--version"]).startswith("moelora ")
