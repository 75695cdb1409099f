"""`python -m moelora_cli` is the command `moelora`."""

from __future__ import annotations

import sys

from moelora_cli import main

if __name__ == "__main__":
    sys.exit(main())
