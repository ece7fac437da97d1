"""Formulas as MathML, which browsers draw themselves: a page needs neither a script nor a network.

MathJax would have to be copied into the site (2 MB) or fetched by every reader. A formula that the converter does
not know is a warning, which a strict build turns into an error.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

# What latex2mathml does not know, in words that it does.
_REPLACEMENTS = (
    (re.compile(r"\\[Bb]ig(?=\s*\\)"), ""),  # \Big\| : plain delimiters, which MathML stretches
    (re.compile(r"\\arg(?![a-z])"), r"\\operatorname{arg}"),
    (re.compile(r"\\textstyle(?![a-z])"), ""),
)


def to_mathml(latex: str, *, is_block: bool) -> str:
    """Converts one formula; line breaks outside any environment begin a new line, aligned at its left.

    Raises:
        ValueError: the converter left something as it stood.
    """
    for pattern, replacement in _REPLACEMENTS:
        latex = pattern.sub(replacement, latex)
    if r"\\" in latex and r"\begin" not in latex:
        lines = [line.strip() for line in latex.split(r"\\")]
        latex = r"\begin{align*} & " + r" \\ & ".join(lines) + r" \end{align*}"
    mathml = convert(latex, display="block" if is_block else "inline")
    unknown = re.search(r">\s*(\\[A-Za-z|]+|&)\s*<", mathml)
    if unknown:
        raise ValueError(f"{unknown[1]} has no MathML here")
    return mathml


def _write(translator: Any, node: nodes.math | nodes.math_block, *, is_block: bool) -> None:
    try:
        mathml = to_mathml(node.astext(), is_block=is_block)
    except Exception as error:  # the converter raises errors of many kinds, none of them documented
        logger.warning("Cannot draw %r: %s", node.astext(), error, location=node)
        mathml = f"<code>{translator.encode(node.astext())}</code>"
    translator.body.append(f'<div class="formula">{mathml}</div>' if is_block else mathml)
    raise nodes.SkipNode


def _visit_inline(translator: Any, node: nodes.math) -> None:
    _write(translator, node, is_block=False)


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    _write(translator, node, is_block=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer ``mathml`` for ``html_math_renderer``."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
