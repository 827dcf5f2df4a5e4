"""``python -m deepopt.optim`` prints the table of optimizers."""

from deepopt._output import outlive_readers
from deepopt.optim.registry import optimizers

outlive_readers()
print(optimizers())
