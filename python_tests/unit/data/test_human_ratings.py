"""The human ratings from a small made-up archive, and the real ones where the cache has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from _datasets import HUMAN_RATINGS_TEXTS, human_ratings_files, write_human_ratings
from torch import Tensor

from excessmtl_ext.data import MultiTaskData, OwnInputsSplit, load_human_ratings
from excessmtl_ext.data.human_ratings import DOMAINS, FILES, RatedTexts
from excessmtl_ext.data.package_files import cache_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_human_ratings(tmp_path / "data")


def own(split: object) -> OwnInputsSplit:
    assert isinstance(split, OwnInputsSplit)
    return split


def observed(data: MultiTaskData) -> OwnInputsSplit:
    return own(data.observed_validation)


def same(first: object, second: object) -> bool:
    one, other = own(first), own(second)
    return all(map(torch.equal, one.inputs, other.inputs)) and all(
        map(torch.equal, one.targets, other.targets)
    )


def test_tasks_and_splits_have_the_promised_shapes(root: Path) -> None:
    data = load_human_ratings(root)
    assert [(task.name, task.kind, task.is_noisy) for task in data.tasks] == [
        ("tweets", "regression", False),
        ("films", "regression", False),
        ("reviews", "regression", False),
        ("editorials", "regression", True),
    ]
    counts = list(HUMAN_RATINGS_TEXTS.values())
    assert [len(each) for each in own(data.test).inputs] == [round(0.2 * n) for n in counts]
    assert [len(each) for each in own(data.validation).inputs] == [round(0.1 * n) for n in counts]
    for index, count in enumerate(counts):
        parts = (data.train, data.validation, data.test)
        assert sum(len(own(part).inputs[index]) for part in parts) == count
    for target in own(data.train).targets:
        assert target.dtype == torch.float32
        assert float(target.mean()) == pytest.approx(0, abs=1e-5)
        assert float(target.std(correction=0)) == pytest.approx(1, abs=1e-5)


def by_hand() -> RatedTexts:
    ratings = torch.tensor([[1, 2, 3, 0], [4, 4, 0, 4], [-1, 1, 0, 0]], dtype=torch.float64)
    return RatedTexts(["a", "b", "c"], ratings, torch.tensor([3, 4, 2]))


def test_variances_by_hand() -> None:
    noise, signal = by_hand().variances()
    # Within: 1, 4 and 2; of the means: 1/3, 1 and 1. The means 2, 3 and 0 have variance 14/9.
    assert noise == pytest.approx(7 / 3)
    assert signal == pytest.approx(14 / 9 - 7 / 9)


def test_a_draw_and_the_others_together_are_all_raters() -> None:
    texts = by_hand()
    drawn, others = texts.draw(1, torch.Generator().manual_seed(0))
    for row, count, one, rest in zip(texts.ratings, texts.num_raters, drawn, others, strict=True):
        assert float(one) in row[:count].tolist()
        assert float(one + rest * (count - 1)) == pytest.approx(float(row.sum()))
    everyone, again = texts.draw(None, torch.Generator())
    assert everyone.tolist() == again.tolist() == [2, 3, 0]


def test_more_raters_are_added_to_those_of_fewer() -> None:
    texts = by_hand()
    singles = texts.draw(1, torch.Generator().manual_seed(3))[0]
    pairs = texts.draw(2, torch.Generator().manual_seed(3))[0]
    for row, count, one, two in zip(texts.ratings, texts.num_raters, singles, pairs, strict=True):
        assert float(2 * two - one) in row[:count].tolist()


def test_fewer_raters_make_noisier_labels_and_say_how_noisy(root: Path) -> None:
    spread: list[list[float]] = []
    for raters in (1, 3, None):
        data = load_human_ratings(root, raters=raters)
        differences = [
            float((a - b).square().mean())
            for a, b in zip(own(data.train).targets, own(data.clean_train).targets, strict=True)
        ]
        spread.append(differences)
        assert data.noise_shares.keys() == DOMAINS.keys()
    assert sum(spread[0]) > 1.5 * sum(spread[1]) > 0
    assert spread[2] == [0.0] * 4
    one, three, everyone = (load_human_ratings(root, raters=k).noise_shares for k in (1, 3, None))
    for task in DOMAINS:
        assert 1 > one[task] > three[task] > everyone[task] > 0
        # noise / k over noise / k + signal: the odds are those of one rater, a third.
        odds = [share[task] / (1 - share[task]) for share in (one, three)]
        assert odds[0] == pytest.approx(3 * odds[1])


def test_validation_has_clean_labels_and_those_a_user_would_have(root: Path) -> None:
    data = load_human_ratings(root, raters=1)
    assert all(map(torch.equal, own(data.validation).inputs, observed(data).inputs))
    assert not any(map(torch.equal, own(data.validation).targets, observed(data).targets))
    assert same(
        load_human_ratings(root, raters=None).observed_validation,
        load_human_ratings(root, raters=None).validation,
    )


def test_the_seed_decides_raters_and_validation_and_not_the_test_texts(root: Path) -> None:
    first, again, other = (load_human_ratings(root, seed=seed) for seed in (0, 0, 1))
    for part in ("train", "validation", "test", "clean_train", "observed_validation"):
        assert same(getattr(first, part), getattr(again, part))
    assert not same(first.train, other.train)
    assert all(map(torch.equal, own(first.test).inputs, own(other.test).inputs))


def test_labels_follow_the_ratings_and_not_the_mean_that_the_other_file_states(root: Path) -> None:
    files = human_ratings_files()
    wrong = {
        name: re.sub(r"\t-?\d\.\d+\t", "\t0.123456\t", text) if "GroundTruth" in name else text
        for name, text in files.items()
    }
    other = write_human_ratings(root.parent / "other", wrong)
    assert same(load_human_ratings(root).train, load_human_ratings(other).train)


def test_equal_texts_are_in_one_part(root: Path) -> None:
    files = human_ratings_files()
    name = "tweets_GroundTruth.txt"
    rows = files[name].split("\r\n")
    # Every text four times.
    rows = [row.rpartition("\t")[0] + f"\tText {index // 4}" for index, row in enumerate(rows[:-1])]
    files[name] = "\r\n".join(rows) + "\r\n"
    data = load_human_ratings(write_human_ratings(root.parent / "twice", files))
    texts = [
        {tuple(row.tolist()) for row in own(part).inputs[0]}
        for part in (data.train, data.validation, data.test)
    ]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert sum(map(len, texts)) == 10


def test_num_train_takes_fewer_texts_of_each_domain(root: Path) -> None:
    data = load_human_ratings(root, num_train=25)
    assert [len(each) for each in own(data.train).inputs] == [25, 25, 21, 25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raters": 0}, r"Expected `raters` in \[1, 5\], .* or None for all, but got 0"),
        ({"raters": 6}, r"Expected `raters` in \[1, 5\], .* but got 6"),
        ({"num_train": 0}, r"Expected `num_train` of at least 1, but got 0"),
        ({"num_buckets": 1}, r"Expected `num_buckets` of at least 2, but got 1"),
    ],
)
def test_arguments_out_of_range_are_named(
    root: Path, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_human_ratings(root, **options)  # type: ignore[arg-type]


def damaged(name: str, old: str, new: str) -> dict[str, str]:
    files = human_ratings_files()
    assert old in files[name]
    return {**files, name: files[name].replace(old, new, 1)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (damaged("tweets_anonDataRatings.txt", "[", "[7, "), r"row '39_1' of tweets_anon.* from -4 to 4, but got \[7"),
        (damaged("tweets_anonDataRatings.txt", "]", ""), r"row '39_1' of tweets_anonDataRatings"),
        (damaged("tweets_anonDataRatings.txt", "[", "[1.5, "), r"ratings from -4 to 4, but got \[1\.5"),
        (damaged("tweets_GroundTruth.txt", "\t", " "), r"line 1 of tweets_GroundTruth.txt .* but got 2 columns"),
        (damaged("tweets_GroundTruth.txt", "1_1\t", "0_1\t"), r"line 2 of tweets_GroundTruth.* the id '0_1' again"),
        (damaged("tweets_GroundTruth.txt", "0_1\t", "x\t"), r"files of tweets .* but 2 are in one of them only"),
        ({**human_ratings_files(), "tweets_GroundTruth.txt": "0_1\t1\tHello\r\n"}, r"tweets_GroundTruth.* got 1 rows"),
        (
            {k: v for k, v in human_ratings_files().items() if k != "tweets_GroundTruth.txt"},
            r"to hold hutto_ICWSM_2014/tweets_GroundTruth\.txt, but it does not",
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    root = write_human_ratings(tmp_path / "data", files)
    with pytest.raises(ValueError, match=message) as caught:
        load_human_ratings(root)
    assert "hutto_ICWSM_2014.tar.gz" in str(caught.value)


def test_a_batch_has_texts_of_every_task_without_their_padding(root: Path) -> None:
    train = own(load_human_ratings(root).train)
    batch = train.batch(torch.arange(len(train)))
    inputs, targets = batch
    for mine, target, part in zip(inputs, targets, train.inputs, strict=True):
        assert isinstance(target, Tensor)
        assert len(mine) == len(target) == len(train)
        assert mine[:, -1].any()
        assert torch.equal(mine[: len(part)], part[:, : mine.shape[1]])


@pytest.mark.skipif(
    not (cache_folder() / FILES.folder).is_dir(), reason="the cache has no human ratings"
)
def test_the_real_ratings_have_the_noise_that_the_documentation_states() -> None:
    data = load_human_ratings(raters=1)
    sizes = [
        sum(len(own(part).inputs[index]) for part in (data.train, data.validation, data.test))
        for index in range(4)
    ]
    assert sizes == [4200, 10605, 3708, 5190]
    shares = {task: round(share, 2) for task, share in data.noise_shares.items()}
    assert shares == {"tweets": 0.25, "films": 0.21, "reviews": 0.18, "editorials": 0.47}
