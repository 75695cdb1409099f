"""The generated pages: complete, true to the code, and every public name documented."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from griffe import Docstring, Parser
from transformers import Trainer

from docs.site import methods, reference
from docs.site.fields import fields_of, preset_words
from docs.site.picture import picture
from moelora import MoeLoraConfig, presets
from moelora.choices import AXES, kinds
from moelora.runs.config import RunConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("preset", presets.available())
def test_page_of_a_preset(preset: str) -> None:
    page = methods.page(preset)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    assert names["config"].preset == preset
    words = preset_words(preset)
    assert [field.name for field, _ in words] == inspect.getfullargspec(
        inspect.unwrap(getattr(presets, preset))
    ).kwonlyargs
    for field, places in words:
        assert places, f"{preset}: what {field.name} sets was not found"
        assert field.meaning, f"{preset}: {field.name} has no meaning"


def test_a_word_is_said_to_set_what_it_sets() -> None:
    places = {field.name: places for field, places in preset_words("mixlora")}
    assert places["top_k"] == ["selection.top_k.k"]
    assert places["r"] == ["experts.lora.r"]
    assert places["balance_coef"] == ["balance.switch.coef"]


def test_picture_shows_the_chosen_experts() -> None:
    drawn = picture(MoeLoraConfig.from_preset("mixlora", num_experts=4, top_k=2))
    assert drawn.count("fill-opacity") == 2
    assert drawn.count('height="34"') == 4
    assert picture(MoeLoraConfig.from_preset("smora")).count("fill-opacity") == 7  # 64 are drawn as 1 to 7 and 64
    assert picture(MoeLoraConfig.from_preset("adamole")).count("dasharray") == 8


def test_all_choices_and_keys_have_a_meaning() -> None:
    for axis in AXES:
        for kind, cls in kinds(axis).items():
            missing = [field.name for field in fields_of(cls) if not field.meaning]
            assert not missing, f"{axis} {kind}: {missing}"
    for name, section in {"": RunConfig, **reference.SECTIONS, **reference.COMPARISON}.items():
        missing = [field.name for field in fields_of(section) if not field.meaning]
        assert not missing, f"{name}: {missing}"


def _public() -> Iterator[tuple[str, Any, type | None]]:
    """Public functions, classes and methods with their names, and the class that a method is of."""
    for module_name in reference.API:
        module = importlib.import_module(module_name)
        for name in reference.public_names(module):
            value = getattr(module, name)
            yield f"{module_name}.{name}", value, None
            for key, member in vars(value).items() if inspect.isclass(value) else ():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if not key.startswith("_") and inspect.isfunction(function):
                    yield f"{module_name}.{name}.{key}", function, value


def _overrides_a_documented_one(name: str, owner: type | None) -> bool:
    """Whether a base class, ours or of another library, documents the method; the mixin's is any trainer."""
    own = name.rpartition(".")[2]
    return owner is not None and any(own in vars(base) for base in (*owner.__mro__[1:], Trainer))


def test_every_public_name_is_documented() -> None:
    """A docstring, and a word on each argument; a tensor of the reference says its shape by its name."""
    missing = []
    for name, value, owner in _public():
        doc = inspect.getdoc(value) or ""
        if not doc:
            missing.append(f"{name}: no docstring")
        is_error = inspect.isclass(value) and issubclass(value, Exception)
        if not callable(value) or is_error or _overrides_a_documented_one(name, owner):
            continue
        if name.startswith("moelora.presets.") and name.rpartition(".")[2] in presets.available():
            continue  # the words of presets are those of their pages
        inherited = {key for base in getattr(value, "__mro__", ())[1:] for key in getattr(base, "__annotations__", {})}
        arguments = [
            parameter.name
            for parameter in inspect.signature(value).parameters.values()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and parameter.name not in {"self", "cls", *inherited}
            and not re.search(r"_[A-Z0-9]+$", parameter.name)
        ]
        # a single argument of a method may be what the sentence is about
        told = arguments if len(arguments) > 1 or inspect.isclass(value) else []
        # what a class takes may be told by a base of ours that its docstring names
        bases = [base for base in getattr(value, "__mro__", ())[1:] if f"`{base.__name__}`" in doc]
        docs = "\n".join([doc, *(inspect.getdoc(base) or "" for base in bases)])
        missing += [f"{name}: {each}" for each in told if not re.search(rf"\b{each}\b", docs)]
    assert not missing, "\n".join(missing)


def test_docstrings_name_no_argument_that_is_gone() -> None:
    wrong = []
    for name, value, _ in _public():
        if not callable(value) or inspect.isclass(value):
            continue
        known = set(inspect.signature(value).parameters)
        named = {each.strip(" *") for each in _argument_names(inspect.getdoc(value) or "")}
        wrong += [f"{name}: {each}" for each in named - known]
    assert not wrong, "\n".join(wrong)


def _argument_names(doc: str) -> list[str]:
    return [
        name
        for section in Docstring(doc).parse(Parser.google, warnings=False)
        if section.kind.value == "parameters"
        for parameter in section.value
        for name in parameter.name.split(",")
    ]


def test_every_public_name_is_on_an_api_page() -> None:
    for module in reference.API:
        page = reference.api_page(module)
        names = reference.public_names(importlib.import_module(module))
        on_methods = set(presets.available()) if module == "moelora.presets" else set()
        for name in set(names) - on_methods:
            assert re.search(rf"^::: {re.escape(module)}\.({name}\.)?{name}$", page, flags=re.MULTILINE), name


def test_every_name_that_the_site_imports_is_on_an_api_page() -> None:
    shown = [
        getattr(module, name)
        for module in map(importlib.import_module, reference.API)
        for name in [*reference.public_names(module), *(["available", "words"] if module is presets else [])]
    ]
    imports = re.compile(r"^ *from (moelora(?:\.\w+)*) import ([\w, ]+)", flags=re.MULTILINE)
    found = [
        (path.name, module, name)
        for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for module, names in imports.findall(path.read_text())
        for name in names.replace(" ", "").split(",")
    ]
    assert len(found) > 20
    missing = [
        each
        for each in found
        if not any(getattr(importlib.import_module(each[1]), each[2]) is known for known in shown)
    ]
    assert not missing, missing


def test_every_verb_is_on_the_page_of_commands() -> None:
    page = reference.commands()
    for verb in ("train", "chat", "expert", "expert add", "completion"):
        assert f"# moelora {verb}\n\n```text\nusage: moelora {verb} " in page
