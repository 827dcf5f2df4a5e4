"""``python -m deepopt.optim`` prints the table of optimizers."""

import argparse

from deepopt._output import outlive_readers
from deepopt.optim.registry import optimizers

argparse.ArgumentParser("python -m deepopt.optim", description="List the optimizers.").parse_args()
outlive_readers()
print(optimizers())
