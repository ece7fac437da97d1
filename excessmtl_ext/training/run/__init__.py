"""One run: its configuration, data, loop, metrics and files."""
