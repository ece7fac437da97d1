"""What the commands share on the terminal: one-line errors, signals, progress, paths."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from excessmtl_ext._ctrl_c import EXIT_STATUS
from excessmtl_ext.training.run.progress import TrainingInterrupted
from excessmtl_ext.training.run.ranks import OtherRankFailed

# What a user can cause and repair; anything else is a fault of ours and keeps its traceback.
USER_ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
    ModuleNotFoundError,
    OtherRankFailed,
    torch.OutOfMemoryError,
)

# What a terminal without these characters shows instead.
_ASCII = {"±": "+-", "−": "-"}


def make_console(*, quiet: bool = False) -> Console:
    """Makes a console that prints what its stream cannot encode as question marks, instead of failing at it.

    A path may hold bytes that are no text, and a stream may take ASCII alone (LANG=C).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    return Console(quiet=quiet)


def printable(console: Console, text: str) -> str:
    """Returns ``text`` with other signs in the place of those that the console cannot print."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        for sign, replacement in _ASCII.items():
            text = text.replace(sign, replacement)
    return text


def print_path(console: Console, what: str, path: Path | str) -> None:
    # Not wrapped: a path broken over two lines cannot be copied.
    console.print(f"{what}: {path}", soft_wrap=True, highlight=False, markup=False)


def resolve_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def progress_bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turns what a user can repair into one message, and Ctrl-C into the exit status that shells expect."""
    try:
        yield
    except USER_ERRORS as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt as interrupt:
        click.echo("Stopped.", err=True)
        raise SystemExit(EXIT_STATUS) from interrupt


@contextmanager
def stop_on_signal(
    console: Console, hint: str = "The same command with --resume goes on from there."
) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C or a termination signal has come.

    The loop asks between steps, so that the checkpoint never holds half a step; the interrupted run then ends with
    the exit status that shells expect, 130 for Ctrl-C. A second Ctrl-C does not wait, and a third one does not even
    wait until everything is closed. Processes of torchrun always wait: they get each signal twice, from the terminal
    and from torchrun, which ends them itself if they take too long.
    """
    received: list[int] = []

    def request(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
            return
        if len(received) == 2:
            raise KeyboardInterrupt
        console.show_cursor()  # which the progress bar has hidden
        os._exit(EXIT_STATUS)

    # Python allows handlers in the main thread only; elsewhere a run cannot be stopped this way.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield lambda: bool(received)
    except TrainingInterrupted as interrupted:
        console.print(f"{interrupted} A checkpoint is saved. {hint}", highlight=False)
        # Of several processes perhaps another one was asked.
        raise SystemExit(128 + (received[0] if received else signal.SIGTERM)) from interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def count_seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"
