"""What goes wrong with each verb: one line that says it, exit status 1, and nothing new on the disk."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moelora_cli import main
from tests.conftest import tiny_model
from tests.export import mixtures
from tests.runs.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Verb:
    """A command that works, and what it reads."""

    words: str
    """`@name` is a path in the folder; `OUT` is the output."""
    reads: str
    """The adapter that is spoiled."""
    base: str = "--base @base"
    """How it is told its base model; for a verb that reads none without data, with data."""
    loads: bool = True
    """Whether it reads the base model even without data."""


_DATA = "--data @rows.jsonl --base @base"
VERBS = {
    "compose": Verb("compose a=@lora b=@lora-2 --router arrow -o OUT", "lora"),
    "compose on rows": Verb("compose a=@lora b=@lora-2 --router centroids --data @tasks.jsonl -o OUT", "lora-2"),
    "add": Verb("expert add @mixture -o OUT", "mixture", _DATA, loads=False),
    "add by rows": Verb("expert add @named -o OUT --name four --rows @rows.jsonl", "named"),
    "drop": Verb("expert drop @mixture -o OUT --experts 0", "mixture", _DATA, loads=False),
    "drop the unused": Verb("expert drop @named -o OUT --unused 0.34", "named", _DATA),
    "freeze": Verb("expert freeze @mixture -o OUT --experts 0", "mixture", _DATA, loads=False),
    "merge": Verb("expert merge @mixture -o OUT --to 2", "mixture", _DATA),
    "cut": Verb("expert cut @mixture -o OUT --rank 1", "mixture", _DATA, loads=False),
    "split": Verb("expert split @lora -o OUT --num-experts 4", "lora", _DATA, loads=False),
    "export to loras": Verb("export @by-task OUT --to lora", "by-task"),
    "export to one lora": Verb("export @mixture OUT --to lora --rank 2", "mixture"),
    "export on data": Verb("export @mixture OUT --to lora --rank 2 --data @rows.jsonl", "mixture"),
    "export to mixlora": Verb("export @mixture OUT --to mixlora", "mixture"),
    "import from mixlora": Verb("export @theirs OUT --to moelora", "theirs"),
    "export to native-moe": Verb("export @mixture OUT --to native-moe --no-check", "mixture"),
    "inspect": Verb("inspect @mixture", "mixture", "", loads=False),
}
OUTPUTS = ["half an output", "a link", "no space", "read-only", "a file as folder", "wrong base"]
WRITING = [name for name in VERBS if name != "inspect"]


@pytest.fixture
def place(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them to spoil, as the working folder: no path in it is in the way of a name."""
    folder = shutil.copytree(originals, tmp_path / "place")
    monkeypatch.chdir(folder)
    return folder


def arguments(place: Path, words: str, output: Path) -> list[str]:
    found = (str(place / word[1:]) if word.startswith("@") else word for word in words.split())
    return [str(output) if word == "OUT" else word.replace("=@", f"={place}/") for word in found]


def refused(place: Path, capsys: pytest.CaptureFixture[str], words: str, output: Path | None = None) -> str:
    """Run a command that must fail; its one line."""
    before = {str(path): path.stat().st_mtime_ns for path in place.rglob("*")}
    capsys.readouterr()
    given = arguments(place, words, output or place / "new" / "out")
    assert main(given) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("moelora ")]
    command = " ".join(given[: 2 if given[0] == "expert" else 1])
    assert line.startswith(f"moelora {command}: ")
    assert "Traceback" not in captured.err
    assert given[0] == "compose" or captured.out == ""  # it says what it has read so far
    assert "Saved" not in captured.out
    assert {str(path): path.stat().st_mtime_ns for path in place.rglob("*")} == before
    return line


def weights_of(adapter: Path) -> Path:
    (file,) = adapter.glob("adapter_model.*")
    return file


def _cut_off(adapter: Path) -> None:
    file = weights_of(adapter)
    file.write_bytes(file.read_bytes()[:3000])


def _not_finite(adapter: Path) -> None:
    file = weights_of(adapter)
    tensors = torch.load(file, weights_only=True) if file.suffix == ".bin" else load_file(file)
    next(tensor for name, tensor in tensors.items() if "B" in name).view(-1)[3] = float("inf")
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no|cannot"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    "half a configuration": (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": '), "JSON|read"),
    "no weights": (lambda folder: weights_of(folder).unlink(), "adapter_model|cannot be read"),
    "half the weights": (_cut_off, "cannot be read|not a readable"),
    "infinite weights": (_not_finite, r"holds NaN or infinity in \S+"),
}


@pytest.mark.parametrize("fault", DAMAGE)
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_adapter(place: Path, capsys: pytest.CaptureFixture[str], verb: str, fault: str) -> None:
    if (verb, fault) == ("inspect", "infinite weights"):
        pytest.skip("it reads no weight, which is what it is for")
    harm, message = DAMAGE[fault]
    harm(place / VERBS[verb].reads)
    words = VERBS[verb].words if not VERBS[verb].loads else f"{VERBS[verb].words} {VERBS[verb].base}"
    line = refused(place, capsys, words)
    assert VERBS[verb].reads in line
    assert re.search(message, line), line


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 4,000 bytes, which rows fit in and weights do not.

    The system says "File too large" where it would say "No space left on device".
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("verb", WRITING)
@pytest.mark.parametrize(
    "fault", ["half an output", "a link", "no space", "read-only", "a file as folder", "wrong base"]
)
def test_an_output_or_a_base_that_does_not_do(
    place: Path, capsys: pytest.CaptureFixture[str], verb: str, fault: str
) -> None:
    words = VERBS[verb].words if not VERBS[verb].loads else f"{VERBS[verb].words} {VERBS[verb].base}"
    output = place / "out"
    if fault == "half an output":
        output.mkdir()
        (output / "adapter_config.json").write_text('{"peft_type": ')
        assert "exists; allowed: a" in refused(place, capsys, words, output)
    elif fault == "a link":  # to a folder that a writer would put its files in
        (place / "elsewhere").mkdir()
        (place / "elsewhere" / "mine.txt").write_text("mine")
        output.symlink_to(place / "elsewhere")
        assert "exists; allowed: a" in refused(place, capsys, words, output)
    elif fault == "no space":
        with full_disk():
            line = refused(place, capsys, words)
        assert "new/out' cannot be written: " in line
        assert "Nothing is left there; is there space" in line
    elif fault == "read-only":
        closed = Path("/proc/moelora-closed")  # where not even root writes
        if os.geteuid() != 0:
            closed = place / "closed"
            closed.mkdir(mode=0o555)
        line = refused(place, capsys, words, closed / "out")
        assert re.search(r"cannot be written: |'/proc' has 0.0 GB left", line), line
    elif fault == "a file as folder":
        assert "cannot be written: " in refused(place, capsys, words, place / "rows.jsonl" / "out")
    else:
        shutil.rmtree(place / "base")
        tokenizer = tiny_tokenizer()
        tiny_model(hidden_size=24, vocab_size=len(tokenizer)).save_pretrained(place / "base")
        tokenizer.save_pretrained(place / "base")
        line = refused(place, capsys, f"{VERBS[verb].words} {VERBS[verb].base}")
        assert re.search(r"not fit|is made for|another shape", line), line


@pytest.mark.parametrize("verb", WRITING)
def test_a_base_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    shutil.rmtree(place / "base")
    line = refused(place, capsys, f"{VERBS[verb].words} {VERBS[verb].base}")
    assert f"{place / 'base'}" in line
    assert "no model in that folder" in line


@pytest.mark.parametrize("verb", WRITING)
def test_the_output_is_the_input(place: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    words = VERBS[verb].words if not VERBS[verb].loads else f"{VERBS[verb].words} {VERBS[verb].base}"
    line = refused(place, capsys, words, place / VERBS[verb].reads)
    assert "exists; allowed: a" in line or "is the input; allowed: a new folder" in line


CLASHES = {
    "compose": ("compose @lora @twin/lora --base @base -o OUT", "several LoRAs are called lora"),
    "add": ("expert add @named -o OUT --name two --rows @rows.jsonl --base @base", "Taken: two"),
    "add twice": ("expert add @uniform -o OUT --count 2 --name new --name new", "two of the new ones"),
    "export": ("export @clash OUT --to lora --base @base", "would be the folder 'a-b', which is taken"),
}


@pytest.mark.parametrize("verb", CLASHES)
def test_names_that_clash(place: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    shutil.copytree(place / "lora", place / "twin" / "lora")
    clash = mixtures.composition(place / "base", changes={"names": ["a b", "a-b", "c"]})
    mixtures.saved(clash, place / "clash")
    mixtures.saved(mixtures.composition(place / "base", scores="constant"), place / "uniform")
    words, message = CLASHES[verb]
    assert message in refused(place, capsys, words)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_works_on_what_is_whole(place: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    """The table above spoils commands that work."""
    words = VERBS[verb].words if not VERBS[verb].loads else f"{VERBS[verb].words} {VERBS[verb].base}"
    assert main(arguments(place, words, place / "new" / "out")) == 0
    shown = capsys.readouterr().out
    if verb != "inspect":
        assert "next" in shown.lower()
        assert any((place / "new" / "out").iterdir())
