"""Runs ``examples/domains.py`` at its full size and writes its tables with their conditions.

    python bench/reproduction/text_domains.py --output RESULTS     15 minutes on one core; resumes where it stopped

README.md is made from scores.csv, speeds.csv and text.csv, which tells what text the machine had.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import domains as example  # type: ignore[import-not-found]
from reporting import environment, read_rows, short_conditions, write_folder

NUM_SEEDS = 3


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=example.Settings.num_steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    settings = example.Settings(num_steps=arguments.steps)
    example.run(arguments.output, example.BY_DEFAULT, range(NUM_SEEDS), settings)
    write_text_sizes(arguments.output / "text.csv", settings)
    write_folder(arguments.output, make_readme(arguments.output, facts), environment=facts)


def write_text_sizes(table: Path, settings: example.Settings) -> None:
    """Writes how many windows of each kind there are, and a digest of them."""
    parts = example.load_text(settings.max_bytes)
    rows = []
    for domain, name in enumerate(example.DOMAINS):
        windows = [part.windows[part.domain_ids == domain] for part in parts]
        digest = hashlib.blake2b(b"".join(w.numpy().tobytes() for w in windows), digest_size=8)
        rows.append([name, *map(len, windows), digest.hexdigest()])
    table.unlink(missing_ok=True)
    example.append(table, ("domain", "train", "test", "digest"), rows)


def make_readme(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """Returns README.md: the example's table, and the loss of every domain."""
    scores, speeds = read_rows(folder / "scores.csv"), read_rows(folder / "speeds.csv")
    seeds = sorted({row["seed"] for row in scores})
    lines = ["# Domains of one language model", "", short_conditions(facts), ""]
    lines += [
        "A byte-level transformer of 137,000 parameters on six kinds of text, the bytes of one of them "
        "shuffled:",
        f"`examples/domains.py`. Losses on held-out documents in bits per byte, mean and range over {len(seeds)} "
        "seeds. Speeds are medians of",
        "steps in turns, on a machine that ran other programs, too: compare the ratios. DoReMi's excess loss needs a "
        "trained reference besides,",
        "here the model of Uniform.",
        "`bench/reproduction/text_domains.py` writes this folder.",
        "",
        *example.summary(scores, speeds),
        "",
        "## Every domain",
        "",
        "Mean loss, and in parentheses mean weight.",
        "",
        *_by_domain(scores),
        "",
        "## Text",
        "",
        "Windows of 65 bytes; text.csv has digests.",
        "",
        "| | training | test |",
        "|---|---|---|",
        *(
            f"| {row['domain']} | {int(row['train']):,} | {int(row['test']):,} |"
            for row in read_rows(folder / "text.csv")
        ),
    ]
    return lines


def _by_domain(scores: Sequence[Mapping[str, str]]) -> list[str]:
    methods = list(dict.fromkeys(row["method"] for row in scores))
    lines = [f"| | {' | '.join(methods)} |", "|---" * (1 + len(methods)) + "|"]
    for domain in example.DOMAINS:
        cells = []
        for method in methods:
            rows = [row for row in scores if (row["method"], row["domain"]) == (method, domain)]
            loss = statistics.fmean(float(row["bits_per_byte"]) for row in rows)
            weight = statistics.fmean(float(row["mean_weight"]) for row in rows)
            cells.append(f"{loss:.3f} ({weight:.3f})")
        lines.append(f"| {domain} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
