"""Scoring adapters beside their base, on a run's own problems and on suites, and where their tokens are routed."""
