"""Adapters and the Hugging Face Hub: read what one is, and upload one with a model card."""

from __future__ import annotations

from moelora.hub.push import push_to_hub
from moelora.hub.read import read_adapter

__all__ = ["push_to_hub", "read_adapter"]
