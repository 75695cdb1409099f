"""The sections of a card on what an adapter was made of, and what it can be exported to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelora.config import MoeLoraConfig
from moelora.export.targets import export_targets
from moelora.files import is_hub_name
from moelora.runs.tables import markdown
from moelora.runs.wording import code, text
from moelora.share.wording import origin_link


def made_of(
    adapter: Mapping[str, Any], thresholds: Sequence[float] = (), *, frozen: bool = True, trained: bool = False
) -> list[str]:
    """The section on the LoRAs that a composition was made of and on its router; none of what was not composed.

    Args:
        adapter: The words of an adapter (`moelora.export.record.adapter_words`).
        thresholds: The least cosine at which each expert takes a prompt.
        frozen: Whether it is still a mixture: which experts does training leave as they are, is the router random?
        trained: Whether there is a record that it was trained after it was composed.
    """
    members, recipe = adapter["members"], adapter["recipe"]
    if not members:
        return []
    of_router = {name: str(count) for name, count in recipe.get("rows", {}).items()}
    columns: dict[str, list[str]] = {
        "expert": [code(member["name"]) for member in members],
        "rank": [str(member["rank"]) for member in members],
        "made from": [_origin(member) for member in members],
        "license": [_license(member) for member in members],
    }
    if any(member["name"] in of_router for member in members):
        columns["rows of the router"] = [of_router.get(member["name"], "not stated") for member in members]
    if thresholds:
        columns["threshold"] = [f"{threshold:.4f}" for threshold in thresholds]
    table = markdown(tuple(columns), list(zip(*columns.values(), strict=True)), numbers=False)
    facts = _router(recipe, known={member["name"] for member in members})
    if frozen:
        if recipe.get("kind") == "topk" and not trained:
            facts.append("the router starts at random, and no record says that it was trained (`moelora train` does)")
        count, E = adapter["frozen"], len(members)
        which = "all experts are" if count == E else f"the first {count} experts are" if count else "no expert is"
        facts.append(f"{which} frozen: training leaves {'them as they are' if count else 'none as it is'}")
    notes = "Names without an owner are those of local folders. A license is what the LoRA's own card states."
    return ["## Made of\n\n" + table + "\n\n" + notes + "\n\n" + "\n".join(f"- {fact}" for fact in facts)]


def _origin(member: Mapping[str, Any]) -> str:
    if "merged" in member:
        return "merged from " + ", ".join(_origin(each) for each in member["merged"])
    revision = f" at {code(member['revision'])}" if member.get("revision") else ""
    minus = " less the mean of " + ", ".join(map(origin_link, member["minus"])) if member.get("minus") else ""
    return (origin_link(member["source"]) if "source" in member else "not known") + revision + minus


def _license(member: Mapping[str, Any]) -> str:
    if "merged" in member:
        return ", ".join(_license(each) for each in member["merged"])
    return code(member["license"]) if member.get("license") else "not stated"


def _router(recipe: Mapping[str, Any], known: set[str]) -> list[str]:
    facts = []
    if kind := recipe.get("kind"):
        words = sorted((name, value) for name, value in recipe.items() if name not in ("kind", "rows", "data"))
        settings = ", ".join(code(f"{name}={value}") for name, value in words if value is not None)
        facts.append(f"router: {code(kind)}" + (f" with {settings}" if settings else ""))
    if recipe.get("rows"):
        total = sum(recipe["rows"].values())
        gone = [name for name in recipe["rows"] if name not in known]
        of = f", also those of {', '.join(map(code, gone))}, which are not in it any more" if gone else ""
        facts.append(f"the router was made from {total} rows{of}{_data(recipe)}")
    return facts


def _data(recipe: Mapping[str, Any]) -> str:
    data = recipe.get("data", [])
    return " of " + ", ".join(origin_link(name, kind="datasets/") for name in data) if data else ""


def data_names(adapter: Mapping[str, Any]) -> list[str]:
    """The data sets on the Hub that a composition's router was made from."""
    return [name for name in adapter["recipe"].get("data", []) if is_hub_name(name)]


def exports(config: MoeLoraConfig, *, is_routed: bool) -> str:
    """The section on what an adapter can be exported to."""
    rows = [
        (code(target.command), target.answer, text(target.words))
        for target in export_targets(config, is_routed=is_routed)
    ]
    return "## What it can be exported to\n\nWith `moelora export ADAPTER OUT` and:\n\n" + markdown(
        ("option", "possible", "what it becomes, or why not"), rows, numbers=False
    )
