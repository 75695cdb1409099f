"""`--help` and `--version` answer at once, and the help of every verb has examples that it would take."""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moelora_cli import EXIT_STATUS, main, make_parser

ROOT = Path(__file__).parents[2]


def verbs() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def test_the_help_imports_nothing_but_the_standard_library() -> None:
    """Not by the clock: torch, transformers and PEFT are what takes seconds, and `moelora` imports them."""
    asked = [["--version"], ["--help"], *([verb, "--help"] for verb in verbs())]
    code = (
        "import sys\n"
        "from moelora_cli import main\n"
        f"for words in {asked}:\n"
        "    try: main(words)\n"
        "    except SystemExit as error: assert error.code == 0, words\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    place = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'moelora' / 'cli')!r}]"
    bare = [sys.executable, "-I", "-S", "-c", f"{place}\n{code}"]  # no site-packages: none is even there
    done = subprocess.run(bare, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "__main__ eval moelora_cli train"


@pytest.mark.parametrize("verb", verbs())
def test_the_examples_of_a_verb_are_words_that_it_takes(verb: str) -> None:
    text = verbs()[verb].format_help().partition("\nExamples:\n")[2]
    examples = [line.strip() for line in text.splitlines() if line.startswith("    moelora ")]
    assert any(example.startswith(f"moelora {verb}") for example in examples)
    for example in examples:
        make_parser().parse_args(shlex.split(example.partition(" > ")[0])[1:])


def test_the_help_tells_the_exit_statuses() -> None:
    assert EXIT_STATUS in " ".join(make_parser().format_help().split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_verbs_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*verbs(), "restart", "held-out"):
        assert word in script


def test_a_reader_may_leave() -> None:
    pytest.importorskip("shtab")
    words = [sys.executable, "-m", "moelora_cli", "completion", "bash"]
    program = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.close()
    assert program.stderr is not None
    assert program.stderr.read() == b""
    assert program.wait() == 128 + signal.SIGPIPE


def test_a_broken_library_is_one_line_and_what_doctor_names(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('half a torch')")

    def moelora(*words: str) -> subprocess.CompletedProcess[str]:
        places = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]"
        code = f"{places}\nfrom moelora_cli import main; sys.exit(main())"
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)

    done = moelora("inspect", "adapter")
    assert done.returncode == 1
    assert done.stderr == "moelora inspect: the library cannot be imported: half a torch. `moelora doctor` says more.\n"
    done = moelora("doctor")
    assert done.returncode == 1
    assert "torch cannot be imported: ImportError: half a torch" in done.stdout
