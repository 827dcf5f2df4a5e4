"""``python -m benchmarks speed``: see ``command.py``."""
