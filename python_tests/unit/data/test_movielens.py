"""MovieLens from small made-up files, and the real ones where the cache has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _datasets import movielens_files, write_movielens
from torch import Tensor

from excessmtl_ext.data import MultiTaskData, TensorSplit, load_movielens
from excessmtl_ext.data.movielens import FILES, GENRES, HISTORY, num_tokens
from excessmtl_ext.data.package_files import cache_folder

NUM_FILMS = 25


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_movielens(tmp_path / "data")


def tensors(split: object) -> TensorSplit:
    assert isinstance(split, TensorSplit)
    return split


def parts(data: MultiTaskData) -> list[TensorSplit]:
    return [tensors(part) for part in (data.train, data.validation, data.test)]


def films_of(row: Tensor) -> tuple[int, list[int]]:
    """The film in question, and those of the history, by number."""
    film = int(row[0]) - 1 - 2 * NUM_FILMS
    return film, [(int(token) - 1) % NUM_FILMS for token in row[1:] if token]


def test_tasks_and_splits_have_the_promised_shapes(root: Path) -> None:
    data = load_movielens(root)
    assert [(task.name, task.num_outputs, task.kind, task.is_noisy) for task in data.tasks] == [
        ("rating", 1, "regression", True),
        ("sex", 2, "classification", False),
        ("age", 7, "classification", False),
        ("genre", 19, "classification", False),
    ]
    counts = [5 + owner % 7 for owner in range(30)]
    assert sum(len(part) for part in parts(data)) == sum(counts)
    for part in parts(data):
        assert part.inputs.shape == (len(part), 1 + HISTORY)
        assert [target.dtype for target in part.targets] == [torch.float32, *[torch.int64] * 3]
    assert num_tokens(data) <= 1 + 3 * NUM_FILMS


def test_a_history_has_the_users_other_films_with_their_opinion(root: Path) -> None:
    rated: dict[int, dict[int, int]] = {}
    for line in movielens_files()["ml-100k.inter"].splitlines()[1:]:
        user, film, stars, _ = map(int, line.split("\t"))
        rated.setdefault(user - 1, {})[film - 1] = stars
    seen = 0
    for part in parts(load_movielens(root)):
        for row in part.inputs:
            film, history = films_of(row)
            (owner,) = [
                user for user, films in rated.items() if {film, *history} == set(films)
            ] or [None]
            assert owner is not None
            assert film not in history
            for token, other in zip(row[1:], history, strict=False):
                assert (int(token) > NUM_FILMS) == (rated[owner][other] >= 4)
            seen += 1
    assert seen == sum(map(len, rated.values()))


def test_a_user_is_in_one_part_and_age_and_sex_are_the_users(tmp_path: Path) -> None:
    # Two users alike in nothing but their films: the parts tell them apart by age.
    data = load_movielens(write_movielens(tmp_path, movielens_files(num_users=60)))
    groups = [0] * 7
    for owner in range(60):
        age = 15 + 2 * owner
        groups[sum(age > limit for limit in (17, 24, 34, 44, 49, 55))] += 5 + owner % 7
    found = torch.cat([part.targets[2] for part in parts(data)]).bincount(minlength=7)
    assert found.tolist() == groups
    share = torch.cat([part.targets[1] for part in parts(data)]).double().mean()
    men = sum(5 + owner % 7 for owner in range(60) if owner % 2)
    assert float(share) == pytest.approx(men / sum(5 + owner % 7 for owner in range(60)))
    histories = [
        {tuple(sorted({int(t) for t in row[1:]})) for row in part.inputs} for part in parts(data)
    ]
    assert not (histories[0] & histories[2])


def test_a_film_of_several_genres_has_the_rarest(root: Path) -> None:
    # Drama 15, Comedy 10, Romance 5, Film-Noir 5, Thriller 5 of 25 films.
    expected = ["Drama", "Comedy", "Romance", "Film-Noir", "Comedy"]
    for part in parts(load_movielens(root)):
        for row, genre in zip(part.inputs, part.targets[3].tolist(), strict=True):
            assert GENRES[genre] == expected[films_of(row)[0] % 5]


def test_noise_is_on_the_ratings_alone(root: Path) -> None:
    data = load_movielens(root, noise=0.5)
    noisy, clean = tensors(data.train), tensors(data.clean_train)
    assert list(data.corrupted) == ["rating"]
    assert not torch.equal(noisy.targets[0], clean.targets[0])
    assert all(map(torch.equal, noisy.targets[1:], clean.targets[1:]))
    other = tensors(load_movielens(root, noise=0.5, noise_kind="heteroscedastic").train)
    assert not torch.equal(noisy.targets[0], other.targets[0])


def changed(name: str, old: str, new: str) -> dict[str, str]:
    files = movielens_files()
    assert old in files[name]
    return {**files, name: files[name].replace(old, new, 1)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            changed("ml-100k.inter", "rating:float", "stars"),
            r"ml-100k\.inter .* lacks rating:float",
        ),
        (changed("ml-100k.inter", "\n1\t", "\n99\t"), r"line 2 of .*ml-100k\.inter .* got '99'"),
        (changed("ml-100k.inter", "\t88\n", "\n"), None),
        (changed("ml-100k.user", "\tF\t", "\tX\t"), r"gender of user 1 in .* but got 'X'"),
        (changed("ml-100k.user", "\t15\t", "\t-1\t"), r"age of user 1 in .* but got '-1'"),
        (changed("ml-100k.item", "Drama", "Dramma"), r"genres in .*ml-100k\.item .* got 'Dramma'"),
        (
            changed("ml-100k.user", "2\t17\tM\tother\t00001", "2"),
            r"line 3 of .*ml-100k\.user .* cut off",
        ),
        ({**movielens_files(), "ml-100k.item": "item_id:token\n1\n"}, r"ml-100k\.item .* 1 rows"),
        ({**movielens_files(), "ml-100k.item": ""}, r"ml-100k\.item to have from 1 to .*it has 0"),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, files: dict[str, str], message: str | None
) -> None:
    root = write_movielens(tmp_path, files)
    if message is None:  # the time stamp is not needed
        load_movielens(root)
        return
    with pytest.raises(ValueError, match=message):
        load_movielens(root)


def test_a_rating_outside_the_stars_is_an_error(tmp_path: Path) -> None:
    files = movielens_files()
    lines = files["ml-100k.inter"].splitlines()
    user, film, _, time = lines[4].split("\t")
    for wrong in ("9", "nan", "x"):
        lines[4] = "\t".join([user, film, wrong, time])
        root = write_movielens(tmp_path, {**files, "ml-100k.inter": "\n".join(lines)})
        with pytest.raises(
            ValueError, match=rf"line 5 of .* from 1 to 5, but got .* and '{wrong}'"
        ):
            load_movielens(root)


def test_a_file_that_is_no_text_is_named(root: Path) -> None:
    (root / "ml-100k.user").write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(ValueError, match=r"ml-100k\.user to be a tab-separated table"):
        load_movielens(root)


@pytest.mark.skipif(
    not (cache_folder() / FILES.folder).is_dir(), reason="the cache has no MovieLens"
)
def test_the_real_ratings_are_complete() -> None:
    data = load_movielens()
    assert sum(len(part) for part in parts(data)) == 100_000
    assert num_tokens(data) <= 1 + 3 * 1682
