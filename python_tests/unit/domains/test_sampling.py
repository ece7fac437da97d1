"""Samplers of domains: how often each comes, workers, ranks, and runs that go on where they were."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from excessmtl_ext.domains import DomainMixture, DomainSampler, DomainWeights

IDS = [0] * 10 + [1] * 30 + [2] * 4


def domains_of(indices: list[int]) -> list[int]:
    return [IDS[index] for index in indices]


def test_domains_come_as_often_as_their_weights_say():
    weights = DomainWeights(3)
    weights.update([0.6, 0.3, 0.1])
    sampler = DomainSampler(IDS, weights, num_samples=6000)
    counts = Counter(domains_of(list(sampler)))
    for domain, share in enumerate((0.6, 0.3, 0.1)):  # 5 standard deviations
        assert abs(counts[domain] - 6000 * share) < 5 * (6000 * share * (1 - share)) ** 0.5


def test_every_sample_of_a_domain_comes_once_before_any_comes_again():
    indices = list(DomainSampler(IDS, DomainWeights(3), num_samples=300))
    for domain, size in enumerate((10, 30, 4)):
        own = [index for index in indices if IDS[index] == domain]
        rounds = [own[start : start + size] for start in range(0, len(own) - size, size)]
        assert len(rounds) >= 2
        assert all(len(set(each)) == size for each in rounds)
        assert rounds[0] != rounds[1]  # in another order


def test_weights_act_while_the_sampler_runs():
    weights = DomainWeights(3)
    indices = iter(DomainSampler(IDS, weights, num_samples=200))
    list(itertools.islice(indices, 100))
    weights.update([0.0, 0.0, 1.0])
    assert set(domains_of(list(indices))) == {2}


def test_equal_seeds_give_equal_draws_and_others_do_not():
    draws = [list(DomainSampler(IDS, DomainWeights(3), seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == len(IDS) == len(DomainSampler(IDS, DomainWeights(3)))


def test_ranks_take_their_parts_of_one_sequence():
    whole = list(DomainSampler(IDS, DomainWeights(3), num_samples=60))
    parts = [
        list(DomainSampler(IDS, DomainWeights(3), num_samples=20, rank=rank, num_ranks=3))
        for rank in range(3)
    ]
    assert [parts[number % 3][number // 3] for number in range(60)] == whole


@pytest.mark.parametrize("num_ahead", [0, 7])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_resumed_sampler_goes_on_with_what_was_drawn_ahead(num_ahead: int, num_ranks: int):
    """The weights change where the run is interrupted: what a loader had fetched by then stays as it was."""
    options: dict[str, Any] = {"num_samples": 50, "num_ranks": num_ranks, "rank": num_ranks - 1}
    weights = DomainWeights(3)
    sampler = DomainSampler(IDS, weights, **options)
    list(sampler)
    running = iter(sampler)
    list(itertools.islice(running, 20))
    ahead = list(itertools.islice(running, num_ahead))
    state = copy.deepcopy(sampler.state_dict(num_used=20))
    weights.update([0.1, 0.1, 0.8])
    expected = [*ahead, *running, *sampler]
    other = DomainSampler(IDS, weights, **options)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert [*other, *other] == expected
    assert len(expected) == 30 + 50


def test_a_state_taken_in_a_resumed_epoch_counts_from_there():
    sampler = DomainSampler(IDS, DomainWeights(3), num_samples=40)
    expected = list(sampler)
    for stop in (10, 15):
        other = DomainSampler(IDS, DomainWeights(3), num_samples=40)
        if stop == 15:
            other.load_state_dict(state)  # noqa: F821  # of the round before
        list(itertools.islice(other, 10 if stop == 10 else 5))
        state = other.state_dict()
    last = DomainSampler(IDS, DomainWeights(3), num_samples=40)
    last.load_state_dict(state)
    assert list(last) == expected[15:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_yields_what_the_sampler_draws(num_workers: int):
    loader = DataLoader(
        IDS,  # type: ignore[arg-type]
        sampler=DomainSampler(IDS, DomainWeights(3), num_samples=40),
        batch_size=8,
        num_workers=num_workers,
    )
    expected = domains_of(list(DomainSampler(IDS, DomainWeights(3), num_samples=40)))
    assert torch.cat(list(loader)).tolist() == expected


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([0, 1, 3], {}, "`domain_ids` between 0 and 2, but got 0 to 3"),
        ([0, 1, 1], {}, "a sample of every domain, but domain 2 has none"),
        ([], {}, "an integer per sample"),
        ([0.5], {}, "an integer per sample"),
        (IDS, {"rank": 2, "num_ranks": 2}, "`rank` < num_ranks = 2, but got 2"),
        (IDS, {"num_samples": 0}, "`num_samples` >= 1"),
    ],
)
def test_wrong_arguments_raise(ids: Any, options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        DomainSampler(ids, DomainWeights(3), **options)


def test_a_wrong_state_is_refused():
    sampler = DomainSampler(IDS, DomainWeights(3))
    with pytest.raises(ValueError, match="3 domains and seed 0, but got one of 3 domains and seed"):
        sampler.load_state_dict(DomainSampler(IDS, DomainWeights(3), seed=4).state_dict())
    with pytest.raises(ValueError, match="`num_used` between 0 and 0"):
        sampler.state_dict(num_used=1)


# ---- streams


class Lines(IterableDataset[str]):
    """``a0, a1, ...``."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __iter__(self) -> Iterator[str]:
        return (f"{self.name}{number}" for number in range(self.size))


def streams() -> list[Lines]:
    return [Lines("a", 5), Lines("b", 1000)]


def test_a_stream_keeps_its_order_and_begins_again():
    mixture = DomainMixture(streams(), DomainWeights(2), num_samples=40)
    drawn = list(mixture)
    first = [sample for sample, domain in drawn if domain == 0]
    second = [sample for sample, domain in drawn if domain == 1]
    assert first == [f"a{number % 5}" for number in range(len(first))]
    assert second == [f"b{number}" for number in range(len(second))]
    assert len(first) + len(second) == 40
    assert min(len(first), len(second)) > 8
    assert [domain for _, domain in mixture] != [domain for _, domain in drawn]  # the next epoch


def test_a_resumed_mixture_yields_what_would_have_come():
    weights = DomainWeights(2)
    mixture = DomainMixture(streams(), weights, num_samples=60)
    running = iter(mixture)
    list(itertools.islice(running, 25))
    state = copy.deepcopy(mixture.state_dict())
    weights.update([0.8, 0.2])
    expected = [*running, *itertools.islice(mixture, 10)]
    other = DomainMixture(streams(), weights, num_samples=60)
    other.load_state_dict(state)
    assert [*other, *itertools.islice(other, 10)] == expected
    assert len(expected) == 45


def test_workers_share_the_streams_and_see_new_weights():
    weights = DomainWeights(2)
    mixture = DomainMixture([Lines("a", 1000), Lines("b", 1000)], weights)
    loader = DataLoader(mixture, batch_size=10, num_workers=2, prefetch_factor=1)
    batches = iter(loader)
    seen: list[str] = []
    for _ in range(10):
        samples, _ = next(batches)
        seen += samples
    assert len(set(seen)) == 100
    weights.update([0.0, 1.0])
    late = [next(batches)[1] for _ in range(10)]
    assert torch.cat(late[4:]).tolist() == [1] * 60  # but for what was fetched ahead


def test_workers_split_the_samples_of_an_epoch():
    mixture = DomainMixture([Lines("a", 50), Lines("b", 50)], DomainWeights(2), num_samples=25)
    loader = DataLoader(mixture, batch_size=None, num_workers=2)
    samples = [sample for sample, _ in loader]
    assert len(samples) == len(set(samples)) == 25


@pytest.mark.filterwarnings("ignore:'set_vital'")  # torchdata asks torch for it
def test_a_stateful_loader_resumes_every_worker():
    data_loaders = pytest.importorskip(
        "torchdata.stateful_dataloader", reason="torchdata is not installed"
    )

    def make() -> Any:
        mixture = DomainMixture(streams(), DomainWeights(2), num_samples=80)
        return data_loaders.StatefulDataLoader(mixture, batch_size=5, num_workers=2)

    loader = make()
    running = iter(loader)
    for _ in range(6):
        next(running)
    state = loader.state_dict()
    expected = [list(samples) for samples, _ in running]
    other = make()
    other.load_state_dict(state)
    assert [list(samples) for samples, _ in other] == expected
    assert len(expected) == 10


def test_too_few_samples_for_the_workers_are_told():
    mixture = DomainMixture([Lines("a", 1)], DomainWeights(1), rank=1, num_ranks=2, num_samples=2)
    with pytest.raises(ValueError, match=r"at least 2 samples in `streams\[0\]`"):
        list(mixture)
    with pytest.raises(ValueError, match="`streams` to hold 2 of them, one per domain, but got 1"):
        DomainMixture([Lines("a", 1)], DomainWeights(2))
