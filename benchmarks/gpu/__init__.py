"""All that a GPU has to show of the package, in one command: ``make gpu``."""
