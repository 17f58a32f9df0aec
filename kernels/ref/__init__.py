"""Torch references: the definition of every operation, in the clearest form rather than the fastest."""
