"""What an export was made of: a small file beside it, from which its card is written. It names no path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.export.adapter import read_json
from moelora.files import is_hub_name, public_name
from moelora.version import __version__

RECORD_FILE = "moelora_export.json"

Form = Literal["lora", "loras", "mixlora", "native-moe"]


def export_record(form: Form, config: MoeLoraConfig, base: object, **facts: Any) -> dict[str, Any]:
    """The record of an export.

    Args:
        form: What the adapter became.
        config: The adapter's configuration.
        base: Its base model, recorded if it is a name on the Hub.
        **facts: What else a card should say, as JSON values.
    """
    named = public_name(base) if isinstance(base, (str, Path)) else ""
    return {
        "form": form,
        "written_by": f"moelora {__version__}",
        "base_model": named if is_hub_name(named) else None,
        "adapter": adapter_words(config),
        **facts,
    }


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Put a record into the folder of its export."""
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_record(folder: Path, form: Form) -> dict[str, Any]:
    """The record in a folder; empty without one.

    Raises:
        ExportError: If it is damaged, or of an export in another form.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return {}
    record = read_json(file)
    if record.get("form") != form:
        raise ExportError(
            f"{str(file)!r} is of an export in the form {record.get('form')!r}; allowed: {form!r}, which the other "
            "files are. Export again, or remove the file."
        )
    needed = {*_ALWAYS, *_FACTS.get(form, ()), *(_DISTILLED if record.get("exact") is False else ())}
    adapter = record.get("adapter")
    of_adapter = adapter.keys() if isinstance(adapter, dict) else set()
    lacking = sorted(needed - record.keys()) or sorted(_OF_ADAPTER - of_adapter)
    if lacking:
        raise ExportError(f"{str(file)!r} lacks {', '.join(lacking)}; it is not as it was written. Export again.")
    return record


_ALWAYS = ("written_by", "base_model", "adapter")
_OF_ADAPTER = {"preset", "axes", "members", "frozen", "recipe"}
_DISTILLED = ("rank", "kept", "steps", "scores", "tokens")
_FACTS: dict[str, tuple[str, ...]] = {
    "lora": ("exact",),
    "native-moe": (
        "architecture",
        "num_experts",
        "top_k",
        "parameters",
        "base_parameters",
        "dtype",
        "num_bytes",
        "notes",
    ),
}


def adapter_words(config: MoeLoraConfig) -> dict[str, Any]:
    """What may be told of an adapter: its preset, a phrase for each axis, its members and how they were composed."""
    axes = config.describe()
    del axes["compute"]  # how it was computed is no property of the adapter
    experts = config.experts
    members: list[dict[str, Any]] = []
    if names := getattr(experts, "names", []):
        ranks = experts.ranks or [experts.r] * len(names)
        sources = [public_origin(origin) for origin in experts.sources or [{}] * len(names)]
        members = [
            {"name": name, "rank": rank, **source} for name, rank, source in zip(names, ranks, sources, strict=True)
        ]
    return {
        "preset": config.preset,
        "axes": axes,
        "members": members,
        "frozen": experts.num_frozen,
        "recipe": getattr(experts, "recipe", {}),
    }


def public_origin(origin: dict[str, Any]) -> dict[str, Any]:
    """Where an expert came from, without paths: they may be in one that was written by hand."""
    found = dict(origin)
    if "source" in origin:
        found["source"] = public_name(origin["source"])
    if "minus" in origin:
        found["minus"] = [public_name(each) for each in origin["minus"]]
    if "merged" in origin:
        found["merged"] = [public_origin(each) for each in origin["merged"]]
    return found
