"""Sweeps: grids of runs, several at a time."""
