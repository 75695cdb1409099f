"""Phrases that cards of all kinds share."""

from __future__ import annotations

from moelora.files import is_hub_name
from moelora.runs.wording import code


def origin_link(name: str, *, kind: str = "") -> str:
    """A link to a repository of the Hub, or the last part of a local path as code.

    Args:
        name: A public name.
        kind: "datasets/" for a data set.
    """
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_hub_name(name) else code(name)


def load_base(auto_class: str, base_model: str | None, *more: str) -> str:
    """The lines of Python that load the base model.

    Args:
        auto_class: The class of transformers.
        base_model: Its name on the Hub, if it is known.
        more: Further arguments.
    """
    unknown = "" if base_model else "BASE_MODEL = ...  # what it was trained on; its name on the Hub is not known\n"
    arguments = [repr(base_model) if base_model else "BASE_MODEL", *more]
    return f"{unknown}base = {auto_class}.from_pretrained({', '.join(arguments)})\n"
