"""From content to HTML: one file, with style, script and data inside."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from moelora.errors import ReportError
from moelora.version import __version__


def render_page(content: dict[str, Any]) -> str:
    """The page.

    Args:
        content: What `read_run` or `compare_runs` returns.

    Raises:
        ReportError: If jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ReportError(
            "the page is made with jinja2, which is not installed: pip install jinja2 matplotlib."
        ) from error
    files = resources.files("eval.page")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = _percent
    template = environment.from_string((files / "page.html").read_text(encoding="utf-8"))
    forgetting = [each["curve"] for each in content["forgetting"]]
    data = {"curves": content["curves"], "forgetting": forgetting, "routing": content["routing"]}
    return template.render(
        **content,
        version=__version__,
        style=(files / "style.css").read_text(encoding="utf-8"),
        script=(files / "script.js").read_text(encoding="utf-8"),
        # Inside a script element only "</" and "<!--" could end it early.
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
    )


def _percent(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{sign}{100 * value:.1f}"
