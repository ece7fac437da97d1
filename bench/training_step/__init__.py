"""The training step's benchmark, see bench_training_step.py."""
