"""Train and score several methods alike: `moelora compare configs/benchmarks/commonsense.yaml`."""
