"""The command `lm_eval` with moelora's adapters and suites known to it.

`python -m eval.lm_eval ...` takes every word that `lm_eval` takes:

    python -m eval.lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks moelora_commonsense

PEFT has no plug-in mechanism, so the plain command cannot load an adapter of moelora's; this one imports moelora first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lm-eval's command line."""
    import moelora  # noqa: F401 - registers the adapter type, and comes before what imports PEFT
    from eval.suites.registry import FOLDER

    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not {"-h", "--help", "--include_path"} & set(words):
        words += ["--include_path", str(FOLDER)]
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
