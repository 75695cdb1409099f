"""Each verb of life after training on real adapters, in one table: `python -m eval.after_training`."""
