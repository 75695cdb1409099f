"""Upload adapters, and what they were exported to, to the Hugging Face Hub with a card."""

from __future__ import annotations

from moelora.share.push import push_to_hub

__all__ = ["push_to_hub"]
