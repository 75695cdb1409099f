from __future__ import annotations

import sys
from pathlib import Path

import pytest

import eval.__main__
import eval.compare.__main__
import train.__main__
from moelora_cli import make_parser, programs
from moelora_cli.programs import IN_WHEEL, load_program, programs_folder

ROOT = Path(__file__).parents[2]


def test_in_a_clone_the_programs_are_beside_the_package() -> None:
    assert programs_folder() == ROOT
    assert load_program("eval.page").__file__ == str(ROOT / "eval" / "page" / "__init__.py")


def test_in_a_wheel_they_are_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "moelora" / IN_WHEEL
    (inside / "program_of_a_test").mkdir(parents=True)
    (inside / "program_of_a_test" / "__init__.py").write_text("ANSWER = 42\n")
    monkeypatch.setattr(programs, "__file__", str(tmp_path / "moelora_cli" / "programs.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert programs_folder() == inside
    assert load_program("program_of_a_test").ANSWER == 42


def test_the_verbs_run_the_files_of_the_programs() -> None:
    words = {"train": train.__main__, "eval": eval.__main__, "compare": eval.compare.__main__}
    for verb, program in words.items():
        options = make_parser().parse_args([verb, "a"])
        assert options.run is program.run
        assert options.stopped == program.STOPPED


def test_words_and_options_come_in_any_order() -> None:
    options = make_parser().parse_args(["train", "run.yaml", "a=1", "--restart", "b=2", "--recipe", "sft", "c=3"])
    assert (options.config, options.overrides, options.restart) == ("run.yaml", ["a=1", "b=2", "c=3"], True)


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_count_is_at_least_one(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        make_parser().parse_args(["eval", "runs/x", f"--limit={value}"])
    assert exit_.value.code == 2
    assert f"--limit: it is {value}; allowed: at least 1" in capsys.readouterr().err
