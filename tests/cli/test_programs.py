from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moelora.cli import programs
from moelora.cli.programs import IN_WHEEL, load_program, programs_folder

ROOT = Path(__file__).parents[2]


def test_in_a_clone_the_programs_are_beside_the_package() -> None:
    assert programs_folder() == ROOT
    assert load_program("eval.page").__file__ == str(ROOT / "eval" / "page" / "__init__.py")


def test_in_a_wheel_they_are_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "moelora" / IN_WHEEL
    (inside / "program_of_a_test").mkdir(parents=True)
    (inside / "program_of_a_test" / "__init__.py").write_text("ANSWER = 42\n")
    monkeypatch.setattr(programs, "__file__", str(tmp_path / "moelora" / "cli" / "programs.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert programs_folder() == inside
    assert load_program("program_of_a_test").ANSWER == 42


def test_the_help_imports_nothing_but_the_library() -> None:
    code = (
        "import sys, moelora; before = set(sys.modules)\n"
        "from moelora.cli import main\n"
        "try: main(['report', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "moelora"
