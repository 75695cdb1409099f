"""What the wheel and the sdist hold: those of `make release` in MOELORA_DIST, or else ones that are built here."""

from __future__ import annotations

import os
import re
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where each folder of the clone is in the wheel.
PLACES = {
    "moelora/cli": "",
    "moelora": "moelora",
    "train": "moelora/_programs/train",
    "eval": "moelora/_programs/eval",
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("MOELORA_DIST")
    if given:
        return Path(given)
    sdist, wheel = pytest.importorskip("hatchling.builders.sdist"), pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("dist")
    for builder in (sdist.SdistBuilder, wheel.WheelBuilder):
        list(builder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    (file,) = dist.glob("*.whl")
    return zipfile.ZipFile(file)


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_has_two_packages_and_every_file_of_them(wheel: zipfile.ZipFile) -> None:
    """None of them is called train or eval, which are names of many others."""
    names = set(wheel.namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"moelora", "moelora_cli"}
    left_out = {ROOT / "eval" / "results", ROOT / "moelora" / "cli"}
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}".lstrip("/")
        for folder, place in PLACES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not (left_out - {ROOT / folder}).intersection(path.parents)
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"moelora/py.typed", "moelora/_programs/eval/page/page.html"} <= expected


def test_its_metadata_are_those_of_the_project(wheel: zipfile.ZipFile) -> None:
    found, project = metadata(wheel), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = re.findall(r'^__version__ = "(.*)"$', (ROOT / "moelora/version.py").read_text(), re.MULTILINE)
    assert (found["Name"], found["Version"], found["Requires-Python"]) == ("moelora", version, ">=3.11")
    assert found["License-Expression"] == "Apache-2.0"
    assert set(found.get_all("Provides-Extra") or []) == set(project["optional-dependencies"])
    assert found.get_payload() == (ROOT / "README.md").read_text()
    # no address that nobody has made
    assert not found.get_all("Project-URL")
    assert found["Home-page"] is None
    (points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "moelora = moelora_cli:main" in wheel.read(points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_sdist_is_what_a_wheel_is_built_from(dist: Path) -> None:
    (file,) = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "docs/methods.md"):
        assert needed in names
    for folder in ("moelora", "moelora/cli/moelora_cli", "train", "eval"):
        assert f"{folder}/__init__.py" in names
    assert not {name.partition("/")[0] for name in names} & {"runs", "dist", ".git", ".venv"}


def test_no_page_names_an_address_that_nobody_has_made() -> None:
    """Of the repository, or of a package index: there is neither yet."""
    pages = [ROOT / "README.md", ROOT / "pyproject.toml", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.yaml")]
    pages += [
        path for folder in PLACES for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".html", ".md")
    ]
    named = re.compile(r"git\+|github\.com/moelora|pip install (-U )?['\"]?moelora")
    assert [str(page) for page in pages if named.search(page.read_text())] == []
