"""Print the LoRA of a request: python route.py NUMBER, the number of its task."""

import json
import sys
from pathlib import Path

ROUTER = json.loads((Path(__file__).parent / "router.json").read_text())


def pick(task: int) -> str | None:
    """The LoRA of a task; None is the base model alone."""
    return ROUTER["loras"][str(task)]


if __name__ == "__main__":
    print(pick(int(sys.argv[1])))
