"""The axis of balance: what keeps the experts in use.

One choice per file; each registers itself.
"""

from moelora.choices import discover

discover(__name__, __path__)
