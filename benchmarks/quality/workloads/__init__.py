"""One file per workload: data, model, loss, metrics."""

LOCKED = ("breast_cancer_wine", "modular_addition", "parity_dyck")
"""Those that no choice may depend on. They are run once, when all else is decided."""
