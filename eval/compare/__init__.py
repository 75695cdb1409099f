"""Train and score several methods alike: `python -m eval.compare configs/benchmarks/commonsense.yaml`."""
