"""Which optimizer trains better: one tuner for all, many small workloads, paired seeds."""
