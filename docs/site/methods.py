"""A page for each preset, made of its docstring, its words, its axes and the exporters' own checks."""

from __future__ import annotations

import inspect
from pathlib import Path

from docs.site.fields import preset_words
from docs.site.picture import picture
from docs.site.tables import cell, table
from moelora import preset_registry
from moelora.choices import AXES
from moelora.config import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.presets.table import parameters_per_rank
from moelora_cli.presets import about

ROOT = Path(__file__).parents[2]

VERIFIED = {
    "golden values": "Golden values: tests compare with numbers that the authors' code gives.",
    "official code's formula": "The formula of the official code, written out as a naive reference that the layers "
    "equal, forward and every gradient.",
    "paper's equations": "The paper's equations, written out as a naive reference that the layers equal, forward and "
    "every gradient. There is no official code, or it was not at hand.",
    "abstract only": "**The abstract only.** The full paper or code could not be read; the choices that are ours are "
    "listed under *The method*.",
    "PEFT": "PEFT, which has the same method: outputs and gradients are equal.",
    "a control": "It is a control of ours, not a published method.",
}


def pages() -> dict[str, str]:
    """The pages by their addresses."""
    return {f"methods/{name}.md": page(name) for name in sorted(preset_registry.available())}


def page(name: str) -> str:
    """The page of one preset, in Markdown."""
    function = preset_registry.find(name)
    config: MoeLoraConfig = function()
    opening, _, rest = (inspect.getdoc(function) or "").partition("\n\n")
    parts = [
        f"# {name}",
        opening,
        picture(config),
        "## Use it",
        _use(name),
        "## The method",
        rest or "The sentence above says all.",
        "## How it was verified",
        VERIFIED[preset_registry.about(name).verified] + _paper(name),
        "## Advice",
        _advice(name, config),
        "## Words and defaults",
        "PEFT's words (`target_modules`, `exclude_modules`, `modules_to_save`, ...) come on top: see the "
        "[configuration reference](../reference/configuration.md#adapter). The last column says what a word sets on "
        "the axes.",
        _words(name),
        "## On the axes",
        _axes(config),
    ]
    return "\n\n".join(parts) + "\n"


def _paper(name: str) -> str:
    paper = preset_registry.about(name).paper
    return f" Paper: [arXiv {paper}](https://arxiv.org/abs/{paper})." if paper else ""


def _task_type(name: str) -> str:
    """One of PEFT's task types that the preset allows: some are for encoders alone."""
    try:
        MoeLoraConfig.from_preset(name, task_type="CAUSAL_LM")
    except ConfigError:
        return "SEQ_CLS"
    return "CAUSAL_LM"


def _use(name: str) -> str:
    shipped = sorted(path for path in (ROOT / "configs").glob(f"*/{name}.yaml"))
    run = f"\n\nA run that trains it: `moelora train {shipped[-1].relative_to(ROOT)}`." if shipped else ""
    words = f'"{name}", task_type="{_task_type(name)}"'
    return (
        f"```python\nimport moelora\n\nconfig = moelora.MoeLoraConfig.from_preset({words})\n```\n\n"
        f"or in the YAML file of a run `adapter: {{preset: {name}}}`.{run}"
    )


def _advice(name: str, config: MoeLoraConfig) -> str:
    """What `moelora presets NAME` says, and what a page can link to."""
    found = list(about(name)["advice"])
    if config.placement.routes_any and config.scores.is_trained and not config.has_balance_loss:
        found.append(
            "No balance loss by default: watch the experts' load in the log (`expert_load/busiest`, "
            "`expert_load/dead`)."
        )
    found.append(f"Trainable parameters of one linear's experts for each unit of `r`: {parameters_per_rank(name)}.")
    found.append("Whether a mixture is worth having at all: [when to use which](../when-to-use.md).")
    return "\n".join(f"- {each}" for each in found)


def _words(name: str) -> str:
    rows = [
        [f"`{field.name}`", f"`{field.default}`", cell(field.meaning), ", ".join(map(_place, places)) or ""]
        for field, places in preset_words(name)
    ]
    return table(("word", "default", "meaning", "sets"), rows) if rows else "It has no words of its own."


def _place(place: str) -> str:
    axis, kind, field = place.split(".")
    return f"[`{axis}.{field}`](../reference/choices.md#{axis}-{kind})"


def _axes(config: MoeLoraConfig) -> str:
    described = config.describe()
    rows = []
    for axis in AXES:
        choices = config.balance if axis == "balance" else [getattr(config, axis)]
        links = ", ".join(f"[`{each.kind}`](../reference/choices.md#{axis}-{each.kind})" for each in choices)
        rows.append([axis, links or "none", f"`{described[axis]}`"])
    return table(("axis", "choice", "fields"), rows)
