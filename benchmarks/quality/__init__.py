"""Which optimizer trains better: one tuner for all, many small workloads, paired seeds."""

from benchmarks.quality.workload import Unavailable, Workload, workload

__all__ = ["Unavailable", "Workload", "workload"]
