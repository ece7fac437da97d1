"""MovieLens-100k: what users of a film recommender rated, and who they are (Harper & Konstan 2015).

The data travel in the wheel of recbole. GroupLens allows research use and forbids to redistribute them.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from excessmtl_ext.data.multitask_data import MultiTaskData, Task
from excessmtl_ext.data.package_files import PackageFiles
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.data.tabular import Table, make_tabular_data

_FOLDER = "recbole/dataset_example/ml-100k"

FILES = PackageFiles(
    title="MovieLens-100k",
    folder="movielens",
    requirement="recbole==1.2.1",
    archive="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    members={
        name: f"{_FOLDER}/{name}" for name in ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
    },
    max_bytes=10_000_000,
    size_mb=2.1,
    licence="research use, no redistribution",
    citation="F.M. Harper and J.A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015",
)

# Upper ends of GroupLens' own age groups.
AGE_LIMITS = (17, 24, 34, 44, 49, 55)
SEXES = ("F", "M")
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western", "unknown",
)  # fmt: skip
LIKED = 4  # a rating from here on
HISTORY = 50
MAX_ITEMS = 100_000
# Which of the tasks are about the user, in the order of the tasks.
USER_TASKS = (1, 2, 3)


def load_movielens(
    data_root: str | Path | None = None,
    *,
    noise: float = 0.0,
    noise_kind: str | None = None,
    seed: int = 0,
    num_train: int | None = None,
) -> MultiTaskData:
    """Reads the ratings, fetching them first where they are not in the cache yet.

    A sample is one rating by one user. Four tasks: the ``rating`` itself (1 to 5 stars, regression) from the film and
    from the user's history, and from the history alone the user's ``sex`` (2 classes) and ``age`` group (7), and the
    ``genre`` (19) of the film that was rated, the rarest in the catalogue where it has several. Users of the test part,
    a fifth and the same for every seed, are in no other part: nothing about them can be learned by heart. Only the
    training labels of ``rating`` carry noise.

    Inputs are tokens [N, 1 + 50]: the film, then up to 50 other films of the same user, drawn once, each as liked (4
    stars and more) or not; 0 behind the last. See `two_towers`.

    Licence: research use, no redistribution. Cite Harper & Konstan 2015.

    Args:
        data_root: Folder with ``ml-100k.inter``, ``ml-100k.item`` and ``ml-100k.user``, or with
            ``recbole-1.2.1-py3-none-any.whl``, or this wheel; None to fetch it with pip once and keep it, see
            `cache_folder`.
        noise: Share of the training ratings that is corrupted, see `corrupt_values`.
        noise_kind: How; None for ``"heavy_tailed"``.
        seed: Decides the validation users and the noise.
        num_train: Number of training ratings; all when None.

    Raises:
        FileNotFoundError: a file is missing and cannot be fetched; says how to get it.
        ValueError: a file is not what its name says, or an argument is out of range.
    """
    folder = FILES.locate(data_root)
    state = tuple((folder / name).stat().st_mtime_ns for name in FILES.members)
    return make_tabular_data(
        _read_table(folder, state),
        noise=noise,
        noise_kind=noise_kind,
        seed=seed,
        num_train=num_train,
        standardise_inputs=False,
    )


def num_tokens(data: MultiTaskData) -> int:
    """Returns how many tokens the network needs: one more than the largest of any part."""
    parts = (data.train, data.validation, data.test)
    largest = max(
        float(inputs.max())
        for part in parts
        for inputs, _ in part.batches(len(part))
        if isinstance(inputs, Tensor)
    )
    return int(largest) + 1


@cache  # every run of a sweep in this process reads the same
def _read_table(folder: Path, state: tuple[int, ...]) -> Table:
    """Reads and joins the three files; ``state`` tells apart two contents of them."""
    users = {
        row["user_id:token"]: row
        for row in _rows(folder, "ml-100k.user", ("user_id:token", "age:token", "gender:token"))
    }
    films = {
        row["item_id:token"]: row
        for row in _rows(folder, "ml-100k.item", ("item_id:token", "class:token_seq"))
    }
    ratings = _rows(folder, "ml-100k.inter", ("user_id:token", "item_id:token", "rating:float"))
    genres = _genres(folder, films)
    sexes = {key: _sex(folder, row) for key, row in users.items()}
    ages = {key: _age_group(folder, row) for key, row in users.items()}
    number_of = {key: number for number, key in enumerate(films)}
    owner_of = {key: number for number, key in enumerate(users)}
    values: list[float] = []
    for line, row in enumerate(ratings, start=2):
        user, film, rating = row["user_id:token"], row["item_id:token"], row["rating:float"]
        try:
            value = float(rating)
        except ValueError:
            value = 0.0
        if user not in users or film not in films or not 1 <= value <= 5:
            raise ValueError(
                f"Expected line {line} of {folder / 'ml-100k.inter'} to have a user and a film of the other two files "
                f"and a rating from 1 to 5, but got {user!r}, {film!r} and {rating!r}. {FILES.how_to_get()}"
            )
        values.append(value)
    owners = torch.tensor([owner_of[row["user_id:token"]] for row in ratings])
    items = torch.tensor([number_of[row["item_id:token"]] for row in ratings])
    stars = torch.tensor(values, dtype=torch.float64)
    by_owner = [
        [row["user_id:token"] for row in ratings],
        [row["item_id:token"] for row in ratings],
    ]
    return Table(
        name="movielens",
        inputs=_tokens(owners, items, stars, len(films)),
        tasks=(
            Task("rating", 1, "regression", is_noisy=True),
            Task("sex", len(SEXES)),
            Task("age", len(AGE_LIMITS) + 1),
            Task("genre", len(GENRES)),
        ),
        targets=(
            stars,
            torch.tensor([sexes[key] for key in by_owner[0]]),
            torch.tensor([ages[key] for key in by_owner[0]]),
            torch.tensor([genres[key] for key in by_owner[1]]),
        ),
        groups=owners,
        noise_kinds={"regression": "heavy_tailed"},
    )


def _tokens(owners: Tensor, items: Tensor, stars: Tensor, num_films: int) -> Tensor:
    """Returns the film of each rating and up to `HISTORY` others of its user: float32 [N, 1 + HISTORY], whole numbers.

    Tokens: 0 is padding, then a film that was not liked, a film that was, and the film in question.
    """
    opinions = 1 + items + num_films * (stars >= LIKED).long()
    tokens = torch.zeros(len(items), 1 + HISTORY)
    tokens[:, 0] = 1 + 2 * num_films + items
    generator = seeded_generator(0, "history", "movielens")
    for owner in owners.unique().tolist():
        rows = (owners == owner).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = min(HISTORY, len(rows) - 1)
        # The next ones on a circle: never the film itself, and every film in equally many histories.
        places = (torch.arange(len(rows))[:, None] + torch.arange(1, count + 1)) % len(rows)
        tokens[rows[:, None], torch.arange(1, count + 1)] = opinions[rows][places].float()
    return tokens


def _rows(folder: Path, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Returns the rows of a tab-separated file, after checking that it has the columns."""
    path = folder / name
    if not 0 < path.stat().st_size <= FILES.max_bytes:
        raise ValueError(
            f"Expected {path} to have from 1 to {FILES.max_bytes:,} bytes, but it has {path.stat().st_size:,}. "
            f"{FILES.how_to_get()}"
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"Expected {path} to be a tab-separated table, but got: {error}."
        ) from error
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing or len(rows) < 10 or len(rows) > MAX_ITEMS * 100:
        raise ValueError(
            f"Expected {path} to be a table of at least 10 rows with the columns {', '.join(columns)}, but it has "
            f"{len(rows):,} rows and lacks {', '.join(missing) or 'none'}. {FILES.how_to_get()}"
        )
    for line, row in enumerate(rows, start=2):
        if any(row[column] is None for column in columns):
            raise ValueError(
                f"Expected line {line} of {path} to have {', '.join(columns)}, but it is cut off."
            )
    return rows


def _genres(folder: Path, films: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    """Returns each film's rarest genre."""
    listed = {key: row["class:token_seq"].split() or ["unknown"] for key, row in films.items()}
    counts = Counter(genre for genres in listed.values() for genre in genres)
    odd = sorted(set(counts) - set(GENRES))
    if odd:
        raise ValueError(
            f"Expected the genres in {folder / 'ml-100k.item'} to be among {', '.join(GENRES)}, but got {odd[0]!r}."
        )
    return {
        key: GENRES.index(min(genres, key=lambda genre: (counts[genre], genre)))
        for key, genres in listed.items()
    }


def _sex(folder: Path, row: Mapping[str, str]) -> int:
    if row["gender:token"] not in SEXES:
        raise ValueError(
            f"Expected the gender of user {row['user_id:token']} in {folder / 'ml-100k.user'} to be F or M, but got "
            f"{row['gender:token']!r}."
        )
    return SEXES.index(row["gender:token"])


def _age_group(folder: Path, row: Mapping[str, str]) -> int:
    age = row["age:token"]
    if not (age.isdecimal() and len(age) <= 3):
        raise ValueError(
            f"Expected the age of user {row['user_id:token']} in {folder / 'ml-100k.user'} to be a number of years, "
            f"but got {age!r}."
        )
    return sum(int(age) > limit for limit in AGE_LIMITS)
