"""Samples of T domains, drawn as often as changing weights say: with an index, or from streams."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from excessmtl_ext.arguments import check_count
from excessmtl_ext.domains.weights import DomainWeights

BLOCK = 256
"""Random numbers that are made at a time."""


class DomainSampler(Sampler[int]):
    """Draws a domain by the weights of the moment, then the next sample of a shuffled round through that domain.

    Like ``WeightedRandomSampler``, but the weights change while it runs, and no sample of a domain comes a second
    time before all have come once. A DataLoader with workers draws ``prefetch_factor * num_workers`` batches ahead;
    so late do the weights act.

    Args:
        domain_ids: Domain of every sample, N integers.
        weights: Of T domains.
        num_samples: Samples of this rank in an epoch; None: N / ``num_ranks``, rounded up.
        seed: Equal seeds and weights give equal draws.
        rank: Number of this process. All ranks draw the same sequence, and each takes its part: their weights must be
            equal, as those of a balancer over ranks are.
        num_ranks: Processes.

    Raises:
        ValueError: a number is out of range, or a domain has no sample.
    """

    def __init__(
        self,
        domain_ids: Tensor | Sequence[int],
        weights: DomainWeights,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        ids = torch.as_tensor(domain_ids, device="cpu")
        sizes = _sizes_of(ids, weights.num_domains)
        _check_rank(rank, num_ranks)
        check_count("seed", seed, 0)
        self.weights = weights
        self.num_samples = -(-len(ids) // num_ranks) if num_samples is None else num_samples
        check_count("num_samples", self.num_samples, 1)
        self.seed, self.rank, self.num_ranks = seed, rank, num_ranks
        self._members = torch.argsort(ids, stable=True).split(sizes)
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self._num_drawn = 0
        self._counts = [0] * weights.num_domains
        self._pending: list[int] = []
        self._recent: list[int] = []
        self._num_left: int | None = None
        self._begun_with = 0
        self._numbers = _Numbers(seed, "draws")

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        self._begun_with = self._num_left or self.num_samples
        self._num_left, self._recent = None, []
        for _ in range(self._begun_with):
            drawn = [self._draw() for _ in range(self.num_ranks)]
            yield self._sample(*drawn[self.rank])

    def _draw(self) -> tuple[int, int]:
        domain = self._next_domain()
        place = self._counts[domain]
        self._counts[domain] += 1
        self._num_drawn += 1
        self._recent.append(domain)
        return domain, place

    def _next_domain(self) -> int:
        if self._pending:
            return self._pending.pop(0)
        return bisect_right(self.weights.bounds(), self._numbers[self._num_drawn])

    def _sample(self, domain: int, place: int) -> int:
        members = self._members[domain]
        turn, position = divmod(place, len(members))
        if self._orders.get(domain, (-1, []))[0] != turn:
            generator = _generator(self.seed, "order", domain, turn)
            order = members[torch.randperm(len(members), generator=generator)]
            self._orders[domain] = (turn, order.tolist())
        return self._orders[domain][1][position]

    def state_dict(self, *, num_used: int | None = None) -> dict[str, Any]:
        """Returns what :meth:`load_state_dict` needs to go on, with the draws that a DataLoader has made ahead.

        It is the same on all ranks.

        Args:
            num_used: Samples of this rank that the loop has used since the latest ``iter`` (batches times their size).
                None: all that were drawn, which is right without workers.

        Raises:
            ValueError: more than were drawn.
        """
        num_recent = len(self._recent) // self.num_ranks
        used = num_recent if num_used is None else num_used
        if not 0 <= used <= num_recent:
            raise ValueError(
                f"Expected `num_used` between 0 and {num_recent}, what was drawn since the latest iter, but got {used}."
            )
        ahead = self._recent[used * self.num_ranks :]
        num_left = self._begun_with - used if self._recent else self._num_left or 0
        return {
            "num_drawn": self._num_drawn - len(ahead),
            "counts": [count - ahead.count(domain) for domain, count in enumerate(self._counts)],
            "pending": [*ahead, *self._pending],
            "num_left": num_left,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state: the next ``iter`` is the rest of its epoch, with the same samples.

        Raises:
            ValueError: the state is of other domains or another seed.
        """
        _check_state(state, self.seed, self._counts)
        self._num_drawn = state["num_drawn"]
        self._counts = list(state["counts"])
        self._pending = list(state["pending"])
        self._num_left = state["num_left"] or None
        self._recent = []


class DomainMixture(IterableDataset[tuple[Any, int]]):
    """Draws from T streams, each as often as the weights of the moment say; yields ``(sample, domain)``.

    A stream that ends begins again. Each worker of a DataLoader, and each rank, takes its own samples of a stream:
    number s, s + S, ... of S. Workers that live for one epoch begin anew with each: use ``persistent_workers=True``, or
    leave ``num_samples`` out and count steps. ``state_dict`` and ``load_state_dict`` are those that torchdata's
    ``StatefulDataLoader`` calls in every worker; without workers, call them yourself.

    Args:
        streams: T iterables that begin anew with every ``iter``, such as data sets; in their own order.
        weights: Of T domains.
        num_samples: Samples of this rank in an epoch; None: no end.
        seed: Equal seeds and weights give equal draws.
        rank: Number of this process.
        num_ranks: Processes.

    Raises:
        ValueError: a number is out of range; while it runs, a stream has fewer than S samples.
    """

    def __init__(
        self,
        streams: Sequence[Iterable[Any]],
        weights: DomainWeights,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if len(streams) != weights.num_domains:
            raise ValueError(
                f"Expected `streams` to hold {weights.num_domains} of them, one per domain, but got {len(streams)}."
            )
        if num_samples is not None:
            check_count("num_samples", num_samples, 1)
        _check_rank(rank, num_ranks)
        check_count("seed", seed, 0)
        self.streams, self.weights = list(streams), weights
        self.num_samples, self.seed, self.rank, self.num_ranks = num_samples, seed, rank, num_ranks
        self._num_drawn = 0
        self._in_epoch = 0
        self._counts = [0] * len(self.streams)
        self._open: dict[int, Iterator[Any]] = {}
        self._continues = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # iterators travel to no other process

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        shard, num_shards = self.rank * num_workers + number, self.num_ranks * num_workers
        own = None
        if self.num_samples is not None:
            own = len(range(number, self.num_samples, num_workers))
        if not self._continues:
            self._in_epoch = 0
        self._continues = False
        numbers = _Numbers(self.seed, "mixture", shard)
        while own is None or self._in_epoch < own:
            domain = bisect_right(self.weights.bounds(), numbers[self._num_drawn])
            sample = self._next_of(domain, shard, num_shards)
            self._counts[domain] += 1
            self._num_drawn += 1
            self._in_epoch += 1
            yield sample, domain

    def _next_of(self, domain: int, shard: int, num_shards: int) -> Any:
        if domain not in self._open:
            self._open[domain] = self._begun(domain, shard, num_shards, self._counts[domain])
        try:
            return next(self._open[domain])
        except StopIteration:
            self._open[domain] = self._begun(domain, shard, num_shards, 0)
        try:
            return next(self._open[domain])
        except StopIteration:
            raise ValueError(
                f"Expected at least {num_shards} samples in `streams[{domain}]`, one per worker and rank, but got "
                "fewer. Take fewer workers."
            ) from None

    def _begun(self, domain: int, shard: int, num_shards: int, skip: int) -> Iterator[Any]:
        """Opens the stream of one shard after ``skip`` samples, beginning again as often as that takes."""
        while True:
            stream = itertools.islice(iter(self.streams[domain]), shard, None, num_shards)
            skipped = sum(1 for _ in itertools.islice(stream, skip))
            if skipped == skip or skipped == 0:
                return stream
            skip = skip % skipped

    def state_dict(self) -> dict[str, Any]:
        """Returns what :meth:`load_state_dict` needs to go on after the latest sample, in this process."""
        return {
            "num_drawn": self._num_drawn,
            "in_epoch": self._in_epoch,
            "counts": list(self._counts),
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; reads the streams up to where it was.

        Raises:
            ValueError: the state is of other domains or another seed.
        """
        _check_state(state, self.seed, self._counts)
        self._num_drawn, self._in_epoch = state["num_drawn"], state["in_epoch"]
        self._counts = list(state["counts"])
        self._open = {}
        self._continues = True


class _Numbers:
    """Random numbers from [0, 1) by position, the same in every run."""

    def __init__(self, *key: object) -> None:
        self._key = key
        self._block = -1
        self._numbers: list[float] = []

    def __getitem__(self, position: int) -> float:
        block, place = divmod(position, BLOCK)
        if block != self._block:
            generator = _generator(*self._key, block)
            self._numbers = torch.rand(BLOCK, generator=generator, dtype=torch.float64).tolist()
            self._block = block
        return self._numbers[place]


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _sizes_of(ids: Tensor, num_domains: int) -> list[int]:
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool or len(ids) == 0:
        raise ValueError(
            f"Expected `domain_ids` to hold an integer per sample, but got shape {list(ids.shape)} of {ids.dtype}."
        )
    if int(ids.min()) < 0 or int(ids.max()) >= num_domains:
        raise ValueError(
            f"Expected `domain_ids` between 0 and {num_domains - 1}, but got {int(ids.min())} to {int(ids.max())}."
        )
    sizes = torch.bincount(ids, minlength=num_domains).tolist()
    if 0 in sizes:
        raise ValueError(
            f"Expected a sample of every domain, but domain {sizes.index(0)} has none. Leave it out, and number the "
            "others anew."
        )
    return sizes


def _check_rank(rank: int, num_ranks: int) -> None:
    check_count("num_ranks", num_ranks, 1)
    check_count("rank", rank, 0)
    if rank >= num_ranks:
        raise ValueError(f"Expected `rank` < num_ranks = {num_ranks}, but got {rank}.")


def _check_state(state: dict[str, Any], seed: int, counts: Sequence[int]) -> None:
    if state["seed"] != seed or len(state["counts"]) != len(counts):
        raise ValueError(
            f"Expected a state of {len(counts)} domains and seed {seed}, but got one of {len(state['counts'])} domains "
            f"and seed {state['seed']}."
        )
