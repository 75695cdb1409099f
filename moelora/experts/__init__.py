"""The axis of experts: what one expert computes, and which tensors hold it.

One choice per file; each registers itself.
"""

from moelora.choices import discover

discover(__name__, __path__)
