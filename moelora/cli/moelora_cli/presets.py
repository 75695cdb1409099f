"""`moelora presets`: the published methods, what each is a point of, and what it was checked against."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moelora_cli.parsing import examples, listed


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "presets",
        help="list the published methods, or describe one",
        description="Print the table of the presets in Markdown: paper, what is routed, the choices on the axes, "
        "parameters, and what each was checked against. With a name, print all about that one: its equation and "
        "deviations, its words with their defaults, and advice.",
        epilog=examples("moelora presets", "moelora presets mixlora", "moelora presets mixlora --json"),
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="a preset")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument(
        "--write", metavar="FILE", nargs="+", default=[], help="pages to renew the table in, instead of printing it"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the table or one preset, or renew the table in files.

    Raises:
        MoeLoraError: If there is no such preset, or a file has no place for the table.
    """
    from moelora import presets
    from moelora.files import write_atomically
    from moelora.presets.table import table, with_table

    if options.write:
        pages = {Path(file): with_table(Path(file).read_text()) for file in options.write}
        for path, page in pages.items():
            write_atomically(path, page)
    elif options.name is not None:
        found = about(options.name)
        print(json.dumps(found, indent=2) if options.json else _page(found))
    elif options.json:
        print(json.dumps([about(name) for name in sorted(presets.available())], indent=2))
    else:
        print(table())


def about(name: str) -> dict[str, Any]:
    """All about a preset.

    Args:
        name: Its name.

    Returns:
        "name", "paper", "verified_against", "description" (its docstring), "words" and "peft_words" (name to default),
        "axes" (the choice on each, in words), "trainable_per_rank" and "advice" (sentences).

    Raises:
        ConfigError: If there is no such preset.
    """
    import inspect

    from moelora import MoeLoraConfig, preset_registry, presets
    from moelora.presets.table import parameters_per_rank

    preset, source = preset_registry.find(name), preset_registry.about(name)
    parameters, config = inspect.signature(preset).parameters, preset()
    own = preset_registry.own_words(name)
    return {
        "name": name,
        "paper": source.paper,
        "verified_against": source.verified,
        "description": inspect.getdoc(preset),
        "words": {word: parameters[word].default for word in own},
        "peft_words": {
            word: _plain(getattr(config, word)) if word != "task_type" else "CAUSAL_LM"
            for word in presets.words(name)
            if word not in own and word in MoeLoraConfig.peft_words()
        },
        "axes": config.describe(),
        "trainable_per_rank": parameters_per_rank(name),
        "advice": _advice(name, config, source),
    }


def _plain(value: Any) -> Any:
    """A value as a file holds it: a choice as its words, a set as a list."""
    from moelora.choices import Choice, write

    if isinstance(value, Choice):
        return write(value)
    return sorted(value) if isinstance(value, set) else value


def _advice(name: str, config: Any, source: Any) -> list[str]:
    """What follows for a user from what the preset is."""
    from moelora.export.targets import export_targets

    routed = config.placement.routes_any
    advice = []
    if source.verified == "abstract only":
        advice.append("Only the abstract of the paper could be read: results of this preset are not the paper's.")
    if source.verified == "a control" or name == "lora":
        advice.append("It is a control: train it beside a method, with as many trainable parameters.")
    if "task_ids" in config.needs:
        advice.append("Batches need `task_ids`: in a run, rows with a column `task`.")
    if "instance_embedding" in config.needs:
        advice.append("Batches need `instance_embedding`, an embedding of each whole input.")
    if config.placement.kind == "moe_block":
        advice.append("The base model has to be a mixture of experts itself, such as OLMoE or Mixtral.")
    if routed and source.verified != "a control":
        advice.append(
            "For tasks that are trained at once one LoRA of equal size is hard to beat: `moelora diagnose run.yaml` "
            "finds out about yours."
        )
        advice.append(
            "With alpha twice an expert's rank start at twice the learning rate of a LoRA of equal size; with the "
            "alpha of that LoRA, at its rate (docs/training.md)."
        )
    targets = export_targets(config, is_routed=routed)
    advice += [f"`moelora export {each.command}` writes {each.words}." for each in targets if each.answer != "no"]
    advice.append(f"`moelora init --preset {name}` writes a file to train it.")
    return advice


def _page(found: dict[str, Any]) -> str:
    return "\n".join(
        [
            found["description"],
            "",
            f"Paper: {found['paper'] or 'none'}. Verified against: {found['verified_against']}.",
            f"Trainable parameters of a linear's experts for each unit of r: {found['trainable_per_rank']}.",
            "",
            "Words and their defaults",
            listed([(word, repr(value)) for word, value in found["words"].items()]),
            "",
            "Words of PEFT and their defaults",
            listed([(word, repr(value)) for word, value in found["peft_words"].items()]),
            "",
            "Choices on the axes, which are words too (docs/options.md)",
            listed(list(found["axes"].items())),
            "",
            "Advice",
            *(f"  - {sentence}" for sentence in found["advice"]),
        ]
    )
