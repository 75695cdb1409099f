"""The axis of scores: from a token to a number for each expert.

One choice per file; each registers itself.
"""

from moelora.choices import discover

discover(__name__, __path__)
