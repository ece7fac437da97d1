"""Ends the command ``excessmtl`` with one line where Ctrl-C comes while it is being imported, or ends.

Importing torch takes seconds. A KeyboardInterrupt within it prints a traceback through torch's modules; so the package
imports this module first. Programs that import the package are left alone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What shells expect of a process that Ctrl-C has ended.
EXIT_STATUS = 128 + signal.SIGINT

_MODULE = "excessmtl_ext.training.cli"


def is_command() -> bool:
    """Returns whether this process runs the command: its script, or ``python -m excessmtl_ext.training.cli``."""
    script = os.path.basename(sys.argv[0]) if sys.argv else ""
    words = getattr(sys, "orig_argv", [])
    return script in ("excessmtl", "excessmtl.exe") or any(
        words[i : i + 2] == ["-m", _MODULE] for i in range(len(words))
    )


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Ends the process with one line: a handler of SIGINT."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nStopped.\n")
    os._exit(EXIT_STATUS)


def install() -> None:
    """Makes Ctrl-C end the command with one line, unless somebody else handles or ignores it."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


@contextmanager
def as_exception() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt in the body, so that what it holds open is closed."""
    if signal.getsignal(signal.SIGINT) is not end_at_once:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, end_at_once)


install()
