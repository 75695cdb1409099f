"""Training programs: `python -m train CONFIG.yaml [key=value ...]`."""
