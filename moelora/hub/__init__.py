"""Adapters on the Hugging Face Hub and on disk: read what one is."""

from __future__ import annotations

from moelora.hub.read import read_adapter

__all__ = ["read_adapter"]
