"""Evaluation: `python -m eval RUN_DIR`."""
