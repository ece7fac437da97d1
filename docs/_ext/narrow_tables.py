"""Tables that read well on a narrow screen.

A table with sentences becomes a list of cards there: each cell is a block under the name of its column, which this
extension puts into the cell and the style sheet shows on narrow screens only. A table of numbers keeps its columns
and scrolls sideways.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

SENTENCE = 40
"""Characters of a cell from which on its table counts as one of sentences."""
MAX_COLUMNS = 4
"""A table with more columns is one of numbers, whatever its cells say."""


def _mark_tables(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for table in doctree.findall(nodes.table):
        rows = [list(row.findall(nodes.entry)) for row in table.findall(nodes.row)]
        if not rows or len(rows[0]) > MAX_COLUMNS:
            continue
        texts = [cell.astext() for row in rows for cell in row]
        if max(map(len, texts)) < SENTENCE:
            continue
        table["classes"].append("sentences")
        names = [cell.astext() for cell in rows[0]]
        for row in rows[1:]:
            for name, cell in zip(names[1:], row[1:], strict=False):
                if name and cell.astext().strip():
                    cell.insert(0, nodes.container("", nodes.Text(name), classes=["column-name"]))


def setup(app: Sphinx) -> dict[str, bool]:
    """Marks the tables of a page when its references are resolved, just before it is written."""
    app.connect("doctree-resolved", _mark_tables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
