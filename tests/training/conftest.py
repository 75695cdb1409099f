"""Every training run starts with a full garbage collection; what the imports left need not be walked each time."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than 20 seconds on one core")


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> Iterator[None]:
    import trl  # noqa: F401

    import moelora.training.sft  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
