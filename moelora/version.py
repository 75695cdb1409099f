"""The version of the package and of the adapter format."""

from __future__ import annotations

__version__ = "0.1.0"

FORMAT_VERSION = 2
"""Raised whenever an older reader would load a newer adapter and compute something else."""
