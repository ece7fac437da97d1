"""Prints the README's table of results from the committed benchmark: what clean and noisy tasks gain or pay.

    python bench/reproduction/headline.py            # the table
    python bench/reproduction/headline.py --write    # into README.md, between its two marks

Scores on clean test labels at each data set's noisy dose, at the epoch that did best on validation labels as noisy as
the training's; means over the tasks of a group and over seeds.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "reproduction" / "results"
OURS, UNIFORM = "excessmtl-recommended", "uniform"
EPOCH = "selected"
GROUPS = ("clean", "noisy")
MARKS = ("<!-- results: bench/reproduction/headline.py --write -->", "<!-- end of results -->")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    if not parser.parse_args().write:
        print(table(read_benchmark()))
        return
    readme = ROOT / "README.md"
    text = with_table(readme.read_text(encoding="utf-8"), table(read_benchmark()))
    readme.write_text(text, encoding="utf-8")


def benchmark_folder() -> Path:
    """Returns the folder of the committed benchmark."""
    (folder,) = RESULTS.glob("benchmark_*")
    return folder


def read_benchmark() -> dict[str, Any]:
    """Returns the results of the committed benchmark."""
    return json.loads((benchmark_folder() / "results.json").read_text(encoding="utf-8"))


def with_table(text: str, new: str) -> str:
    """Returns the README with the table between its marks."""
    first, last = (re.escape(mark) for mark in MARKS)
    content = f"{MARKS[0]}\n{new}\n{MARKS[1]}"
    text, count = re.subn(f"{first}\n.*?{last}", lambda _: content, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(
            f"Expected README.md to hold the two marks once, but found them {count} times."
        )
    return text


def table(results: dict[str, Any]) -> str:
    """Returns the table in Markdown: a row per data set, the two methods and their difference per group of tasks."""
    lines = [
        "| | clean tasks: Uniform | ExcessMTL | noisy tasks: Uniform | ExcessMTL |",
        "|---|---|---|---|---|",
    ]
    for each in results["tables"]:
        if not each["is_ranked"]:
            continue
        scores = {line["method"]: line["scores"] for line in each["methods"]}
        cells = [cell for group in GROUPS for cell in _cells(scores, group)]
        lines.append(f"| {each['title']}, {each['dose']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(scores: dict[str, Any], group: str) -> tuple[str, str]:
    """Returns the score under uniform weights, and ours with the difference."""
    uniform, ours = (
        round(scores[method][f"{group}, {EPOCH}"]["mean"], 3) for method in (UNIFORM, OURS)
    )
    # Of the rounded numbers, so that a reader who subtracts finds the same.
    return _text(f"{uniform:.3f}"), _text(f"{ours:.3f} ({ours - uniform:+.3f})")


def _text(number: str) -> str:
    return number.replace("-", "−")


if __name__ == "__main__":
    main()
