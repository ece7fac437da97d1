"""Ways to run a balanced step, each an :class:`excessmtl_ext.step.Engine`."""
