"""Links from a page to a file outside ``docs/``, written as they work in the repository, made to work on the site.

A Markdown file that some page includes is linked as that page; any other file of the repository is copied into the
site by MyST. A link to a file that does not exist stays as it is, and is a warning.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

_INCLUDE = re.compile(r"^```\{include\} (\S+)$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]+\.md)(?=[)#])")


def pages_by_included_file(docs: Path) -> dict[Path, Path]:
    """For each Markdown file that is included as a whole or in part, the first page that does so."""
    pages: dict[Path, Path] = {}
    for page in sorted(docs.rglob("*.md")):
        for name in _INCLUDE.findall(page.read_text(encoding="utf-8")):
            pages.setdefault((page.parent / name).resolve(), page)
    return pages


def _rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    docs = Path(app.srcdir)
    pages = pages_by_included_file(docs)
    folder = (docs / docname).parent

    def page_link(match: re.Match[str]) -> str:
        page = pages.get((folder / match[1]).resolve())
        return match[1] if page is None else os.path.relpath(page, folder)

    source[0] = _LINK.sub(page_link, source[0])


def _redirect(app: Sphinx, doctree: nodes.document) -> None:
    """Does the same to the links of what a page includes, whose source no event shows."""
    docs = Path(app.srcdir)
    pages = pages_by_included_file(docs)
    for link in doctree.findall(pending_xref):
        if link.get("refdomain") == "doc":
            page = pages.get((docs / f"{link['reftarget']}.md").resolve())
            if page is not None:
                link["reftarget"] = page.relative_to(docs).with_suffix("").as_posix()


def setup(app: Sphinx) -> dict[str, bool]:
    """Rewrites each page's source as it is read, and the links of included files after that."""
    app.connect("source-read", _rewrite)
    app.connect("doctree-read", _redirect)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
