"""What others wrote (names, licenses, settings) in a card, so that it is read as text and as nothing else."""

from __future__ import annotations

import re

from moelora.files import is_hub_name


def code(text: object) -> str:
    """A code span on one line: in it Markdown and HTML mean nothing."""
    words = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split()) or " "
    longest = max(map(len, re.findall("`+", words)), default=0)
    fence = "`" * (longest + 1)
    space = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{space}{words}{space}{fence}"


def text(words: object) -> str:
    """Words on one line in which links, emphasis, code and HTML are shown as they are written."""
    line = " ".join(str(words).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]])", r"\\\1", line)


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
