"""Sentiment of short texts as people rated it, every rater's score kept: label noise that nobody injected.

The data of Hutto & Gilbert 2014 ("VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM-14), which travel in the source distribution of their package.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from excessmtl_ext.data.multitask_data import MultiTaskData, Task
from excessmtl_ext.data.own_inputs import OwnInputsSplit
from excessmtl_ext.data.package_files import PackageFiles, read_member
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.data.text_features import hashed_features, pad_features

_INNER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"

FILES = PackageFiles(
    title="the human ratings of VADER",
    folder="human_ratings",
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members={_INNER_ARCHIVE: f"vaderSentiment-3.3.2/additional_resources/{_INNER_ARCHIVE}"},
    max_bytes=20_000_000,
    size_mb=2.5,
    licence="MIT",
    citation="C.J. Hutto and E. Gilbert, VADER, ICWSM 2014",
)

# Task -> stem of its two files.
DOMAINS = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "reviews": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
NOISIEST = "editorials"

NUM_BUCKETS = 8_192
LOWEST, HIGHEST = -4, 4
MIN_RATERS = 3
MAX_FILE_BYTES = 20_000_000

TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
# The test texts do not depend on the seed of a run.
TEST_SPLIT_SEED = 0


@dataclass(frozen=True)
class RatedTexts:
    """The texts of one domain and what each rater gave.

    Attributes:
        texts: N texts.
        ratings: float64 [N, R], whole numbers from -4 (extremely negative) to 4 (extremely positive), one for each
            rater; 0 behind the last where a text has fewer than R.
        num_raters: int64 [N].
    """

    texts: Sequence[str]
    ratings: Tensor
    num_raters: Tensor

    def is_rating(self) -> Tensor:
        """Returns which entries of ``ratings`` are one: bool [N, R]."""
        return torch.arange(self.ratings.shape[1]) < self.num_raters[:, None]

    def means(self) -> Tensor:
        """Returns the mean over all raters: float64 [N]."""
        return self.ratings.sum(1) / self.num_raters

    def variances(self) -> tuple[float, float]:
        """Returns the variance of a single rating about its text's mean, and that of the true means.

        The first is the mean of the unbiased variances within the texts. What it adds to the variance of the observed
        means is taken off the second.
        """
        deviations = (self.ratings - self.means()[:, None]) * self.is_rating()
        within = deviations.square().sum(1) / (self.num_raters - 1)
        of_mean = within / self.num_raters
        signal = float(self.means().var(correction=0) - of_mean.mean())
        return float(within.mean()), max(0.0, signal)

    def draw(self, count: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns each text's mean over ``count`` raters drawn for it, and over the others; None takes all for both.

        With the same generator, more raters are added to those of fewer.
        """
        if count is None:
            return self.means(), self.means()
        keys = torch.rand(self.ratings.shape, generator=generator)
        order = keys.masked_fill(~self.is_rating(), 2.0).argsort(1)
        drawn = self.ratings.gather(1, order[:, :count]).sum(1)
        others = self.ratings.sum(1) - drawn
        return drawn / count, others / (self.num_raters - count)


def load_human_ratings(
    data_root: str | Path | None = None,
    *,
    raters: int | None = 1,
    seed: int = 0,
    num_train: int | None = None,
    num_buckets: int = NUM_BUCKETS,
) -> MultiTaskData:
    """Reads the rated texts, fetching them first where they are not in the cache yet.

    Four tasks, ``tweets`` (4,200 texts), ``films`` (10,605 snippets), ``reviews`` (3,708 snippets) and ``editorials``
    (5,190 snippets), each with its own texts, see `OwnInputsSplit`: the mean rating is regressed from hashed words and
    character 4-grams, see `hashed_features`. The label of a training text is the mean of ``raters`` of its raters,
    drawn once; its clean label is the mean of the others. Validation texts have both too. Test labels are the mean of
    all raters, and the test texts, a fifth of each domain, are the same for every seed. A text that occurs twice is in
    one part. Targets are standardised with mean and deviation of the training labels.

    A single rating's noise share is 0.25 for tweets, 0.21 for films, 0.18 for reviews and 0.47 for editorials;
    ``noise_shares`` has those of the mean of ``raters``. With the same seed, more raters are added to those of fewer.

    Licence: MIT. Cite Hutto & Gilbert 2014. The ratings' own means are used: for 199 tweets the other file of the
    archive states another mean.

    Args:
        data_root: Folder with ``hutto_ICWSM_2014.tar.gz`` or with ``vaderSentiment-3.3.2.tar.gz``, or this archive;
            None to fetch it with pip once and keep it, see `cache_folder`.
        raters: k, how many raters make a training label, at least 1 and fewer than any text has (15); None for all, so
            that the labels are as clean as the test labels.
        seed: Decides validation texts and raters.
        num_train: Training texts of each domain, or all of those that have fewer; all when None.
        num_buckets: Of the hashed features.

    Raises:
        FileNotFoundError: the archive is missing and cannot be fetched; says how to get it.
        ValueError: a file is not what its name says, or an argument is out of range.
    """
    archive = FILES.locate(data_root) / _INNER_ARCHIVE
    state = archive.stat().st_mtime_ns
    domains = {task: _read_domain(archive, state, task) for task in DOMAINS}
    fewest = min(int(domain.num_raters.min()) for domain in domains.values())
    if raters is not None and not 1 <= raters < fewest:
        raise ValueError(
            f"Expected `raters` in [1, {fewest - 1}], so that each text keeps a rater for its clean label, or None for "
            f"all, but got {raters}."
        )
    if num_buckets < 2:
        raise ValueError(f"Expected `num_buckets` of at least 2, but got {num_buckets}.")
    if num_train is not None and num_train < 1:
        raise ValueError(f"Expected `num_train` of at least 1, but got {num_train}.")

    parts: dict[str, list[Tensor]] = {
        name: []
        for name in (
            "inputs",
            "labels",
            "clean",
            "v_inputs",
            "v_labels",
            "v_clean",
            "t_inputs",
            "t_clean",
        )
    }
    shares: dict[str, float] = {}
    for task, domain in domains.items():
        train, validation, test = _split(domain.texts, task, seed)
        train = train[:num_train]
        drawn, others = domain.draw(raters, seeded_generator(seed, "raters", task))
        mean, std = drawn[train].mean(), drawn[train].std(correction=0)
        tokens = _tokens(archive, state, task, num_buckets)
        for name, values, chosen in (
            ("labels", drawn, train),
            ("clean", others, train),
            ("v_labels", drawn, validation),
            ("v_clean", others, validation),
            ("t_clean", domain.means(), test),
        ):
            parts[name].append(((values[chosen] - mean) / std).float())
        for name, chosen in (("inputs", train), ("v_inputs", validation), ("t_inputs", test)):
            parts[name].append(tokens[chosen])
        noise, signal = domain.variances()
        of_label = noise / raters if raters else noise * float((1 / domain.num_raters).mean())
        shares[task] = of_label / (of_label + signal)

    def split(inputs: str, targets: str) -> OwnInputsSplit:
        return OwnInputsSplit(tuple(parts[inputs]), tuple(parts[targets]))

    return MultiTaskData(
        tasks=tuple(Task(task, 1, "regression", is_noisy=task == NOISIEST) for task in DOMAINS),
        train=split("inputs", "labels"),
        validation=split("v_inputs", "v_clean"),
        test=split("t_inputs", "t_clean"),
        clean_train=split("inputs", "clean"),
        observed_validation=split("v_inputs", "v_labels"),
        noise_shares=shares,
    )


def _split(texts: Sequence[str], task: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the numbers of training, validation and test texts; equal texts stay together."""
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        groups.setdefault(" ".join(text.lower().split()), []).append(number)
    members = list(groups.values())
    order = torch.randperm(
        len(members), generator=seeded_generator(TEST_SPLIT_SEED, "split", "human_ratings", task)
    ).tolist()
    num_test = round(TEST_SHARE * len(members))
    test, rest = order[:num_test], order[num_test:]
    again = torch.randperm(
        len(rest), generator=seeded_generator(seed, "split", "human_ratings", task, "validation")
    ).tolist()
    num_validation = round(VALIDATION_SHARE * len(members))
    chosen = {
        "train": [rest[position] for position in again[num_validation:]],
        "validation": [rest[position] for position in again[:num_validation]],
        "test": test,
    }
    numbers = {
        part: torch.tensor([number for group in which for number in members[group]])
        for part, which in chosen.items()
    }
    return numbers["train"], numbers["validation"], numbers["test"]


# ---- the files ----------------------------------------------------------------------------------


@cache  # every run of a sweep in this process reads the same
def _tokens(archive: Path, state: int, task: str, num_buckets: int) -> Tensor:
    """Returns the hashed features of a domain's texts, int32 [N, L]; ``state`` tells apart two contents of the file."""
    texts = _read_domain(archive, state, task).texts
    return pad_features([hashed_features(text, num_buckets=num_buckets) for text in texts])


@cache
def _read_domain(archive: Path, state: int, task: str) -> RatedTexts:
    """Reads a domain's two files and joins them by their ids."""
    stem = DOMAINS[task]
    text_rows = _read_rows(archive, f"{stem}_GroundTruth.txt", ("id", "mean", "text"))
    rating_rows = _read_rows(
        archive, f"{stem}_anonDataRatings.txt", ("id", "mean", "deviation", "ratings")
    )
    texts = {key: text for key, (_, text) in text_rows.items()}
    ratings = {
        key: _parse_ratings(archive, f"{stem}_anonDataRatings.txt", key, row[-1])
        for key, row in rating_rows.items()
    }
    if texts.keys() != ratings.keys():
        odd = sorted(texts.keys() ^ ratings.keys())
        raise ValueError(
            f"Expected the two files of {stem} in {archive} to have the same ids, but {len(odd)} are in one of them "
            f"only, {odd[0]!r} for instance."
        )
    rows = [ratings[key] for key in texts]
    num_raters = torch.tensor([len(row) for row in rows])
    domain = RatedTexts(
        list(texts.values()),
        torch.zeros(len(rows), int(num_raters.max()), dtype=torch.float64),
        num_raters,
    )
    domain.ratings[domain.is_rating()] = torch.tensor(
        [value for row in rows for value in row], dtype=torch.float64
    )
    return domain


def _read_rows(archive: Path, name: str, columns: Sequence[str]) -> Mapping[str, list[str]]:
    """Returns the rows of a tab-separated file inside the archive, by id, without it."""
    content = read_member(archive, f"hutto_ICWSM_2014/{name}", max_bytes=MAX_FILE_BYTES)
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline=None).read().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {name} in {archive} to be UTF-8, but got: {error}.") from error
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        key, *rest = line.split("\t")
        if len(rest) != len(columns) - 1 or key in rows:
            why = f"the id {key!r} again" if key in rows else f"{len(rest) + 1} columns"
            raise ValueError(
                f"Expected line {number} of {name} in {archive} to have {', '.join(columns)}, and each id once, "
                f"but got {why}."
            )
        rows[key] = rest
    if len(rows) < 10:
        raise ValueError(f"Expected texts in {name} in {archive}, but got {len(rows)} rows.")
    return rows


def _parse_ratings(archive: Path, name: str, key: str, text: str) -> list[int]:
    """Returns the ratings of one row, written ``[0, -1, 2]``."""
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        values = None
    if (
        not isinstance(values, list)
        or len(values) < MIN_RATERS
        or not all(type(value) is int and LOWEST <= value <= HIGHEST for value in values)
    ):
        raise ValueError(
            f"Expected row {key!r} of {name} in {archive} to end in at least {MIN_RATERS} ratings from {LOWEST} to "
            f"{HIGHEST}, but got {text:.60}."
        )
    return values
