"""The fused step's benchmark, see bench_fused_step.py."""
