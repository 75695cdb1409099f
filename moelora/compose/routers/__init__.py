"""How a composition chooses among its experts: one recipe a file; each registers itself."""

from moelora.choices import discover

discover(__name__, __path__)
