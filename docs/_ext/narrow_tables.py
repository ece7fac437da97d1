"""Tables that read well on a narrow screen.

A table with sentences becomes a list of cards there: each cell is a block under the name of its column, which this
extension puts into the cell and the style sheet shows on narrow screens only. A table of numbers keeps its columns
and scrolls sideways.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

SENTENCES = {4: 40, 100: 70}
"""Up to so many columns, a table counts as one of sentences where a cell has so many characters."""


def _mark_tables(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for table in doctree.findall(nodes.table):
        rows = [list(row.findall(nodes.entry)) for row in table.findall(nodes.row)]
        if not rows:
            continue
        # The first column names the row; a column of long names suits a table of numbers.
        longest = max((len(cell.astext()) for row in rows for cell in row[1:]), default=0)
        if longest < min(SENTENCES[n] for n in SENTENCES if n >= len(rows[0])):
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
