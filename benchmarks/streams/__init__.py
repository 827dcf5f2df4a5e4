"""Tasks that change while they are learned, and one that does not, for memories to be compared."""
