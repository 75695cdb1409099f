"""`moelora doctor`: whether what is installed works together."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from moelora_cli.parsing import examples, listed
from moelora_cli.programs import library_folder

# Each of these is outside of the bounds of pyproject.toml, with the reason that is given there.
KNOWN_BAD: tuple[tuple[Mapping[str, str], str], ...] = (
    ({"transformers": "<5.23"}, "its Trainer gives encoders and T5 a loss that is too large by the accumulation steps"),
    ({"transformers": ">=5.24", "peft": "<0.22"}, "the adapter API of transformers refuses a PEFT below 0.22"),
    ({"peft": "<0.21"}, "it refuses to save an adapter type that is not in its own enum"),
    (
        {"transformers": ">=5.23", "peft": ">=0.21,<0.21.2"},
        "this PEFT asks transformers for a method of encoder-decoders that is gone",
    ),
    ({"peft": ">=0.22"}, "its method tables and state-dict code, which moelora registers with, may have moved"),
)
# Extras that are made of others, or for the work on moelora itself.
_GROUPS = ("all", "dev", "release")
# In the order in which one needs the other; what each is called when it is imported.
IMPORTED = ("torch", "transformers", "peft", "accelerate", "datasets", "moelora")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="find out whether what is installed works together",
        description="Print versions, devices and extras, and what is wrong with them: packages that are missing, "
        "outside of the versions that moelora supports, known not to work together, or that cannot be imported. The "
        "exit status is 1 where something is.",
        epilog=examples("moelora doctor", "moelora doctor --json"),
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(needs_library=False)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print what was found; the exit status."""
    found = examine()
    print(json.dumps(found, indent=2) if options.json else _page(found))
    return 1 if found["problems"] else 0


def examine() -> dict[str, Any]:
    """What is installed.

    Returns:
        "moelora", "python", "platform", "folder"; "packages", a mapping of names to "version" (None if missing),
        "needs" and "extras" (empty of what the library itself needs); "extras", whether each is installed whole;
        "devices", in words; "problems", sentences.
    """
    from moelora_cli import version

    packages, problems = _packages()
    problems += bad_pairs({name: each["version"] for name, each in packages.items() if each["version"]})
    problems += _imports()
    extras = sorted({extra for each in packages.values() for extra in each["extras"]})
    return {
        "moelora": version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "folder": str(library_folder()),
        "packages": packages,
        "extras": {
            extra: all(each["version"] for each in packages.values() if extra in each["extras"]) for extra in extras
        },
        "devices": _devices(),
        "problems": problems,
    }


def requirements() -> dict[str, list[Any]]:
    """What `moelora` asks for, by extra; "" is what it always needs.

    In a clone this is in pyproject.toml, else in the metadata of the wheel.
    """
    from packaging.requirements import Requirement

    file = library_folder().parent / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        words = {"": project["dependencies"], **project["optional-dependencies"]}
        return {
            extra: [Requirement(each) for each in wanted] for extra, wanted in words.items() if extra not in _GROUPS
        }
    found: dict[str, list[Any]] = {"": []}
    extras = set(metadata.metadata("moelora").get_all("Provides-Extra") or []) - set(_GROUPS)
    for each in map(Requirement, metadata.requires("moelora") or []):
        marker = each.marker
        for extra in [""] if marker is None else [name for name in extras if marker.evaluate({"extra": name})]:
            found.setdefault(extra, []).append(each)
    return found


def bad_pairs(versions: Mapping[str, str]) -> list[str]:
    """Versions that are known not to work, alone or together, each with the reason.

    Args:
        versions: Names of installed packages to their versions.
    """
    from packaging.specifiers import SpecifierSet

    found = []
    for pair, reason in KNOWN_BAD:
        if all(name in versions and SpecifierSet(spec).contains(versions[name], True) for name, spec in pair.items()):
            names = " with ".join(f"{name} {versions[name]}" for name in pair)
            found.append(f"{names} does not work: {reason}.")
    return found


def _packages() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What is asked for and what is there, and what is wrong with it."""
    packages: dict[str, dict[str, Any]] = {}
    problems = []
    for extra, wanted in requirements().items():
        for each in wanted:
            try:
                version = metadata.version(each.name)
            except metadata.PackageNotFoundError:
                version = None
            known = packages.setdefault(
                each.name, {"version": version, "needs": str(each.specifier) or "any version", "extras": []}
            )
            if extra:
                known["extras"].append(extra)
            fix = f'pip install "{each.name}{each.specifier}"'
            if version is None and not extra:
                problems.append(f"{each.name} is not installed; moelora needs {known['needs']}: `{fix}`.")
            elif version is not None and not each.specifier.contains(version, prereleases=True):
                problems.append(f"{each.name} {version} is installed; moelora needs {known['needs']}: `{fix}`.")
    return packages, problems


def _imports() -> list[str]:
    """What of `IMPORTED` cannot be imported, and whether PEFT then knows the method."""
    problems = []
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken library fails in any way
            problems.append(f"{name} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            break  # what needs it would only say the same
    else:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        if "MOELORA" not in {getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}:
            problems.append("importing moelora did not register it with PEFT.")
    return problems


def _devices() -> list[str]:
    """The devices that torch sees, in words."""
    cpu = f"CPU, {os.cpu_count()} threads"
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):
        return [cpu]
    found = [f"{cpu}, {torch.get_num_threads()} used by torch"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            words = torch.cuda.get_device_properties(index)
            bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            found.append(f"cuda:{index}, {words.name}, {words.total_memory / 2**30:.0f} GiB, {bf16}")
    elif torch.accelerator.is_available():
        found.append(str(torch.accelerator.current_accelerator()))
    return found


def _page(found: Mapping[str, Any]) -> str:
    packages = found["packages"]

    def lines(extra: str) -> list[tuple[str, str]]:
        mine = {
            name: each for name, each in packages.items() if (extra in each["extras"] if extra else not each["extras"])
        }
        return [(name, f"{each['version'] or 'not installed'}  (needs {each['needs']})") for name, each in mine.items()]

    parts = [
        listed([("moelora", f"{found['moelora']}  ({found['folder']})"), ("python", found["python"]), *lines("")], 0),
        "",
        "Devices",
        *(f"  {device}" for device in found["devices"]),
        "",
    ]
    for extra, is_whole in found["extras"].items():
        parts += [f"Extra {extra}: {'installed' if is_whole else 'not installed'}", listed(lines(extra))]
    parts.append("")
    if found["problems"]:
        parts += ["Problems", *(f"  - {problem}" for problem in found["problems"])]
    else:
        parts.append("Nothing is wrong.")
    return "\n".join(parts)
