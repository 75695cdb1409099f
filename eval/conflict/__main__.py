"""Do my tasks need a mixture? The same as `moelora diagnose`.

For example `python -m eval.conflict configs/quickstart.yaml --plan`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moelora.runs.program import exit_status
from moelora_cli.diagnose import DESCRIPTION, EPILOG, add_arguments, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.conflict", description=DESCRIPTION, epilog=EPILOG)
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: run(options), stopped="Stopped. Run the same command again to resume it.")


if __name__ == "__main__":
    sys.exit(main())
