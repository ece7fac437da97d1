"""The command ``excessmtl``: trains, compares, and says what went wrong in one line."""

from __future__ import annotations

from typing import Any

from excessmtl_ext._ctrl_c import as_exception

try:
    import click

    from excessmtl_ext.training.cli.benchmark import benchmark
    from excessmtl_ext.training.cli.demo import demo
    from excessmtl_ext.training.cli.pictures import figures, report
    from excessmtl_ext.training.cli.sweep import sweep
    from excessmtl_ext.training.cli.train import train
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("click", "rich"):
        raise
    raise ModuleNotFoundError(
        f'The command needs {error.name}, which is not installed: pip install ".[train]" in a clone.',
        name=error.name,
    ) from error

__all__ = ["main"]


class _Command(click.Group):
    """A group whose commands get Ctrl-C as an exception, see `excessmtl_ext._ctrl_c`."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Runs the command line."""
        with as_exception():
            return super().main(*args, **options)


@click.group(cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="excessmtl-ext")
def main() -> None:
    """Train one network on several tasks whose labels cannot all be trusted."""


for _command in (train, sweep, benchmark, demo, figures, report):
    main.add_command(_command)
