"""The shape of the house: no import circle, imports point one way, and files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package of its own, which a wheel has beside the library.
COMMAND = ROOT / "moelora" / "cli"
LONGEST_FILE = 450

# From the ground up: a module may import those of its own level and of lower ones. The axes' own packages (experts,
# scores, selection, balance, routing, ops) lie between the protocol of a choice and the layers; placement, the one axis
# that knows modules of the base model, lies with the injection. `moelora` itself is above all of them; of the highest
# level it imports only what has to come before PEFT, `runs.quiet`, which imports nothing of the library.
LEVELS: list[tuple[str, ...]] = [
    ("errors", "version", "validation", "peft_type", "forward", "files", "autocast", "progress"),
    ("choices", "formats", "preset_registry", "peft_plugin"),
    ("tensors", "routing", "experts", "scores", "selection", "balance", "ops"),
    ("config",),
    ("layers",),
    ("inject",),
    ("fingerprint", "loading", "model", "undo"),
    ("presets", "training", "compose"),
    ("hub", "runs"),
    ("export",),  # reads adapters and makes folders as these two do
    ("share",),  # says of an adapter what it can be exported to
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules(package: str) -> dict[str, Path]:
    """The files of a package by the names they are imported by."""
    found = {}
    place = COMMAND if package == "moelora_cli" else ROOT
    for path in sorted((place / package).rglob("*.py")):
        if place == ROOT and COMMAND in path.parents:
            continue
        name = ".".join(path.relative_to(place).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """What a module imports: also in functions and under TYPE_CHECKING. A name of a package may be a module of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            full = {f"{base}.{alias.name}" for alias in node.names}
            found |= {each if each in known else base for each in full}
    return found - {name}


def graph() -> dict[str, set[str]]:
    """What each module of the library imports of the library."""
    files = modules("moelora")
    return {name: imports(name, path, set(files)) & set(files) for name, path in files.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(edges[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def area(name: str) -> str:
    """The file or folder right below `moelora` that a module is in; "" of `moelora` itself."""
    return name.partition(".")[2].partition(".")[0]


def test_a_circle_is_found() -> None:
    """Guards the test below."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_in_functions_and_for_types_count(tmp_path: Path) -> None:
    """Guards the tests below."""
    file = tmp_path / "a.py"
    file.write_text(
        "import p.b\ndef f():\n    from p import c\nif TYPE_CHECKING:\n    from .d import x\nfrom p.e import y\n"
    )
    assert imports("p.a", file, {"p", "p.b", "p.c", "p.d", "p.e"}) == {"p.b", "p.c", "p.d", "p.e"}


def test_there_is_no_circle_of_imports() -> None:
    found = circle(graph())
    assert not found, " -> ".join([*found, found[0]])


def test_every_module_has_a_level() -> None:
    assert {area(name) for name in graph()} - {""} == set(LEVEL_OF)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in sorted(others)
        if area(name) and LEVEL_OF.get(area(other), len(LEVELS)) > LEVEL_OF[area(name)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["moelora_cli", "train", "eval", "tests"])
def test_the_library_imports_nothing_of_the_programs_around_it(package: str) -> None:
    files = modules("moelora")
    wrong = [
        name
        for name, path in files.items()
        if package in {each.partition(".")[0] for each in imports(name, path, set())}
    ]
    assert wrong == []


def test_the_configuration_needs_no_layer() -> None:
    """Neither directly nor through anything else."""
    edges, seen, rest = graph(), set(), ["moelora.config"]
    while rest:
        name = rest.pop()
        if name not in seen:
            seen.add(name)
            rest += edges[name]
    for other in ("layers", "inject", "model", "presets", "training", "hub", "share"):
        assert other not in {area(name) for name in seen}


def test_importing_the_library_imports_no_trainer() -> None:
    """TRL is optional, and loading an adapter needs no trainer."""
    script = (
        "import sys, moelora; print([name for name in sys.modules if name.startswith(('moelora.training', 'trl'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["moelora", "moelora_cli", "train", "eval", "tests"])
def test_files_stay_small(package: str) -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules(package).values()}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}
