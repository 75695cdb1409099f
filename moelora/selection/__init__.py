"""The axis of selection: who is chosen, with what weight.

One choice per file; each registers itself.
"""

from moelora.choices import discover

discover(__name__, __path__)
