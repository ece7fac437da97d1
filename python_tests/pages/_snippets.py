"""Code blocks of the pages, and how a test runs them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, in their order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run_blocks(page: Path) -> dict[str, Any]:
    """Runs the page's Python blocks one after the other and returns the names they leave."""
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    return names


class NanTarget:
    """Stands in for ``torch.randn`` and puts one NaN into the n-th tensor of the targets' shape."""

    def __init__(self, shape: tuple[int, ...], call: int) -> None:
        self.shape, self.call = shape, call
        self.num_calls = 0
        self._randn = torch.randn

    def __call__(self, *size: int, **options: Any) -> Tensor:
        made = self._randn(*size, **options)
        if tuple(size) == self.shape:
            if self.num_calls == self.call:
                made[0, -1] = float("nan")
            self.num_calls += 1
        return made


def parameters_of(names: dict[str, Any]) -> Iterator[Tensor]:
    """The parameters of the encoder and the heads that a snippet has made."""
    yield from names["encoder"].parameters()
    yield from names["heads"].parameters()
