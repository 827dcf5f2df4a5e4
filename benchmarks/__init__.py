"""Measurements of deepopt: ``python -m benchmarks --help``."""
