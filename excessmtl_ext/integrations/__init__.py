"""Thin adapters to other projects' training loops; each imports its project, so nothing here is imported before use.

``excessmtl_ext.integrations.torchjd``, ``.libmtl``, ``.lightning``, ``.accelerate`` and
``.transformers``. Every one takes any :class:`excessmtl_ext.Balancer` whose weights come from what
that project hands over.
"""

from __future__ import annotations

__all__ = ["missing_package"]


def missing_package(
    package: str,
    error: ModuleNotFoundError,
    install: str = "pip install 'excessmtl-ext[integrations]'",
) -> ImportError:
    """What to raise when ``package`` cannot be imported: the module that is missing, and how to get it."""
    return ImportError(
        f"Expected {package} to be installed, but there is no module {error.name!r}. Install it: {install}"
    )
