"""``python -m excessmtl_ext.training.cli``."""

from excessmtl_ext.training.cli import main

main()
