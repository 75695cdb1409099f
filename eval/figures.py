"""Writing matplotlib's figures."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from moelora.files import write_atomically


def are_possible() -> bool:
    """Whether matplotlib is installed, which is of the extra `report`."""
    return importlib.util.find_spec("matplotlib") is not None


def save(figure: Any, file: Path, dpi: int = 120) -> None:
    """Write a figure as PNG; the picture is there whole or as it was before."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_atomically(file, content.getvalue())
