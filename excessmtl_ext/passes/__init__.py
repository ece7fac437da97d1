"""Backward passes: the only modules that call autograd."""
