"""Evaluation: `moelora eval RUN_DIR`."""
