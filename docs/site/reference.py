"""The reference pages: the keys of a run's file, the choices on the axes, and the public names of the library."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from types import ModuleType

from docs.site.fields import Field, fields_of, summary
from docs.site.tables import cell, table
from eval.compare import schema as compare
from moelora.choices import kinds
from moelora.compose import routers  # noqa: F401 - registers the recipes
from moelora.config import MoeLoraConfig
from moelora.runs import config as run
from moelora.training.router_training import RouterTraining
from moelora_cli import EXIT_STATUS, make_parser
from moelora_cli.parsing import HelpFormatter

SECTIONS: dict[str, type] = {
    "dataset": run.DatasetConfig,
    "sequential": run.SequentialConfig,
    "router_training": RouterTraining,
    "baseline": run.BaselineConfig,
    "evaluation": run.EvaluationConfig,
}
"""The sections of a run's file that are dataclasses of ours."""

COMPARISON: dict[str, type] = {
    "Top level": compare.BenchmarkConfig,
    "methods": compare.MethodConfig,
    "data": compare.DataConfig,
    "data, tasks of reasoning-gym": compare.SkillData,
    "selection": compare.SelectionConfig,
    "evaluation": compare.ScoringConfig,
}
"""The sections of a comparison's file."""

API = {
    "moelora": "The names of the package itself.",
    "moelora.presets": "The published methods by name. Each has a page under [Methods](../../methods.md).",
    "moelora.compose": "Mixtures of LoRAs that exist, and experts added, dropped, merged, cut, split, switched.",
    "moelora.export": "Adapters in other forms.",
    "moelora.share": "Uploads to the Hub.",
    "moelora.hub": "What an adapter is, read without loading its tensors.",
    "moelora.errors": "Every error that is raised on purpose is one of these.",
    "moelora.choices": "The protocol of a choice, for those who add a method.",
    "moelora.compose.tokens": "Rows as the recipes of a router read them.",
    "moelora.preset_registry": "How a method gets its name.",
    "moelora.routing.decision": "What a router has decided.",
    "moelora.scores.base": "The protocol of scores.",
    "moelora.selection.base": "The protocol of a selection.",
    "moelora.ops.reference": "Every operation as a plain function of tensors. Tensors are named by their shapes: the "
    "legend is at the top.",
}
"""The public modules, with a sentence each."""


def pages() -> dict[str, str]:
    """The pages by their addresses."""
    api = {f"reference/api/{module}.md": api_page(module) for module in API}
    made = {"configuration": configuration, "comparisons": comparisons, "choices": choices, "commands": commands}
    return {**{f"reference/{name}.md": page() for name, page in made.items()}, **api}


def public_names(module: ModuleType) -> list[str]:
    """What a module gives to its users: its `__all__`, or what it defines without an underscore."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return [
            name for name in listed if not name.startswith("_") and not isinstance(getattr(module, name), ModuleType)
        ]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def api_page(name: str) -> str:
    """The page of one module: each public name by itself, so that none can be missing."""
    module = importlib.import_module(name)
    shown = ["available", "words"] if name == "moelora.presets" else public_names(module)
    blocks = "\n\n".join(f"::: {_address(module, each)}" for each in shown)
    about = (module.__doc__ or "").strip()
    return f"# `{name}`\n\n{API[name]}\n\n{about}\n\n{blocks}\n"


def _address(module: ModuleType, name: str) -> str:
    """How the reference finds a name: `moelora.compose.choose` is a function and also the module that holds it."""
    address = f"{module.__name__}.{name}"
    return f"{address}.{name}" if hasattr(module, "__path__") and find_spec(address) else address


def configuration() -> str:
    """The page of a run's YAML file."""
    lines = [
        "# Configuration reference",
        "What the YAML file of `moelora train` and `moelora eval` may say. An unknown key fails and lists the "
        "valid ones. Keys can be changed on the command line: `moelora train run.yaml training.max_steps=200`. This "
        "page is made from the code.",
        "## Top level",
        _table(fields_of(run.RunConfig)),
        "## adapter",
        "`preset` and that preset's words ([Methods](../methods.md)), or `path`. Every preset takes these words too, "
        "and the [axes](choices.md), which change what it chose: `selection: {renormalize: false}`.",
        _table([field for field in fields_of(MoeLoraConfig) if field.name in {*MoeLoraConfig.peft_words()}]),
        "The words without a meaning here are those of `peft.PeftConfig`.",
        "## training",
        "The fields of [`trl.SFTConfig`](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig), which has those "
        "of `transformers.TrainingArguments`: `learning_rate`, `max_steps`, `per_device_train_batch_size`, "
        "`report_to`, ...",
    ]
    return "\n\n".join([*lines, *_sections(SECTIONS)]) + "\n"


def comparisons() -> str:
    """The page of a comparison's YAML file."""
    lines = [
        "# Comparisons",
        "What the YAML file of `moelora compare` may say. This page is made from the code; "
        "`configs/benchmarks/` has files that were run.",
        *_sections(COMPARISON),
    ]
    return "\n\n".join(lines) + "\n"


def commands() -> str:
    """The page of the command `moelora`: the help of each verb."""
    lines = ["# Commands", EXIT_STATUS, "This page is the `--help` of each verb."]
    lines += [
        f"{'#' * level} {parser.prog}\n\n```text\n{_help(parser)}```" for level, parser in _verbs(make_parser(), 2)
    ]
    return "\n\n".join(lines) + "\n"


def _verbs(parser: ArgumentParser, level: int) -> Iterator[tuple[int, ArgumentParser]]:
    """The verbs of a command, and below each its own."""
    for action in parser._actions:
        for verb in action.choices.values() if isinstance(action.choices, dict) else ():
            yield level, verb
            yield from _verbs(verb, level + 1)


def _help(parser: ArgumentParser) -> str:
    parser.formatter_class = partial(HelpFormatter, width=100)
    return parser.format_help()


def _sections(sections: Mapping[str, type]) -> list[str]:
    return [part for name, cls in sections.items() for part in (f"## {name}", summary(cls), _table(fields_of(cls)))]


def choices() -> str:
    """The page of all choices on all axes."""
    questions = {
        "experts": "What does one expert compute, and which tensors hold it?",
        "placement": "What does a mixture wrap, and which sites share a router?",
        "scores": "From a token, sequence or task to a number for each expert.",
        "selection": "Who is chosen, with what weight?",
        "balance": "What keeps the experts in use and apart? Any number of choices.",
        "compute": "How is it computed fast?",
        "composition": "Not an axis: how a [composition](../compose-routers.md) finds its router. A recipe gives "
        "scores and a selection.",
    }
    lines = [
        "# Choices on the axes",
        "A method is a choice on each of six axes. A choice is a `kind` and its fields: "
        '`selection={"kind": "top_k", "k": 2}` in Python, `selection: {kind: top_k, k: 2}` in YAML. '
        "[Options on the axes](../options.md) shows which go with which preset. This page is made from the code.",
    ]
    for axis, question in questions.items():
        lines += [f"## {axis}", question]
        for kind, cls in sorted(kinds(axis).items()):
            lines += [f"### `{kind}` {{#{axis}-{kind}}}", summary(cls)]
            fields = fields_of(cls)
            lines.append(_table(fields) if fields else "It has no fields.")
    return "\n\n".join(lines) + "\n"


def _table(fields: list[Field]) -> str:
    rows = [[f"`{f.name}`", f"`{f.type}`", f"`{f.default}`", cell(f.meaning)] for f in fields]
    return table(("key", "type", "default", "meaning"), rows)
