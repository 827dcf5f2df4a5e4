"""Measurements of deepopt: ``python -m benchmarks --help``."""

from benchmarks.quality.workload import workload

__all__ = ["workload"]
