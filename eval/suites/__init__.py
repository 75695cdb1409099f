"""Task suites in lm-eval's YAML, and how to find them."""
