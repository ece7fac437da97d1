"""Thin adapters to the training loops of other projects: torchjd, LibMTL, Lightning, Accelerate and transformers.

Each module imports its project when it is imported itself. It accepts every
:class:`excessmtl_ext.Balancer` whose weights depend only on what the project provides.
"""

from __future__ import annotations

__all__ = ["missing_package"]


def missing_package(
    package: str,
    error: ModuleNotFoundError,
    install: str = "pip install '.[integrations]' in a clone of this package, or the package itself",
) -> ImportError:
    """Makes the error for a ``package`` that cannot be imported: the missing module, and how to install it."""
    return ImportError(
        f"Expected {package} to be installed, but there is no module {error.name!r}. Install it: {install}"
    )
