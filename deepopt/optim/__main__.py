"""``python -m deepopt.optim`` prints the table of optimizers."""

from deepopt.optim.registry import optimizers

print(optimizers())
