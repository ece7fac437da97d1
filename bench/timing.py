"""Takes time for every benchmark of this project: interleaved samples in one process, medians, spread.

Two calls that are compared run in turn, round after round, so that whatever else the machine does
meets both. A ratio is the median over rounds of the ratio within a round; a quotient of two medians
would compare different moments.

Cache states:

- ``"warm"``: an untimed call, then several timed ones in a row; a sample is their mean.
- ``"cold"``: before each timed call a buffer larger than the last-level cache is written.
- ``"streaming"``: the data is much larger than the caches, so every call is cold.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

CacheState = Literal["warm", "cold", "streaming"]

MIN_SAMPLE_S = 5e-4
"""A warm sample lasts at least this long: far above the clock's resolution, below a time slice."""

CPU_FLUSH_BYTES = 256 << 20
"""Written before a cold call on the CPU: larger than the cache that a few cores share."""

MIN_STEP_SAMPLE_S = 0.03
"""A sample of training steps lasts at least this long: a slow first step after a change of caches weighs little."""

DEFAULT_CUDA_FLUSH_BYTES = 256 << 20
"""Above twice the L2 of an H100 (50 MiB); takes 0.1 ms, in which the host queues the timed call."""


@dataclass(frozen=True)
class Timing:
    """Samples of one call, in seconds, in the order of the rounds."""

    samples: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples)

    @property
    def min_s(self) -> float:
        return min(self.samples)

    def quartiles_s(self) -> tuple[float, float]:
        return quartiles(self.samples)


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles over rounds of one call's time divided by another's."""

    median: float
    low: float
    high: float


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; both the value itself where there is one only."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """Compares two calls round by round."""
    ratios = [a / b for a, b in zip(numerator.samples, denominator.samples, strict=True)]
    return Ratio(statistics.median(ratios), *quartiles(ratios))


def best_ratio(numerator: Timing, denominator: Timing) -> float:
    """Fastest sample over fastest sample: what is left of a ratio when other processes stall both."""
    return numerator.min_s / denominator.min_s


class Stopwatch:
    """Times calls on one device. On CUDA by events behind a flush, so that the host's launch cost hides where it can.

    Args:
        device: Where the calls work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        flush_bytes = CPU_FLUSH_BYTES
        if device.type == "cuda":
            l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            flush_bytes = max(DEFAULT_CUDA_FLUSH_BYTES, 2 * l2_bytes)
        self._flush_numel = flush_bytes // 4
        self._flush_buffer: torch.Tensor | None = None  # made on the first cold call

    def flush(self) -> None:
        """Writes a buffer larger than the last-level cache."""
        if self._flush_buffer is None:
            self._flush_buffer = torch.zeros(self._flush_numel, device=self.device)
        self._flush_buffer.add_(1.0)

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Mean time of ``calls`` calls in a row."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / calls
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls

    def sample(self, call: Callable[[], object], calls: int, cache: CacheState) -> float:
        """One sample in the given cache state."""
        if cache == "warm":
            call()
            return self.seconds(call, calls)
        if cache == "cold" or self.device.type == "cuda":
            self.flush()
        return self.seconds(call, 1)


def measure(
    calls: Mapping[str, Callable[[], object]],
    stopwatch: Stopwatch,
    *,
    cache: CacheState,
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 101,
) -> dict[str, Timing]:
    """Times several calls in turn until the budget is spent.

    Args:
        calls: Name to call. Each changes its own state only, and costs the same whenever it runs.
        stopwatch: Of the device the calls work on.
        cache: See the head of this file.
        budget_s: Wall clock for all calls together, warm-up not counted.
        min_rounds: Rounds whatever the budget.
        max_rounds: Rounds at most.

    Returns:
        Name to timing, all with equally many samples.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(2):  # compiles, faults pages in, starts threads
            call()
        once = min(stopwatch.seconds(call, 1) for _ in range(3))
        repeats[name] = max(1, math.ceil(MIN_SAMPLE_S / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + budget_s
    names = list(calls)
    for round_index in range(max_rounds):
        if round_index >= min_rounds and time.perf_counter() > deadline:
            break
        for name in names:
            samples[name].append(stopwatch.sample(calls[name], repeats[name], cache))
        names.reverse()  # nobody always follows the same neighbour
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def step_seconds(
    step: Callable[[], object],
    count: int,
    device: torch.device,
    clock: Callable[[], float] | None = None,
) -> float:
    """Mean time of ``count`` calls in a row, the device's work included: what a training loop waits for.

    ``clock`` None is the wall's.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = clock or time.perf_counter
    begin = clock()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - begin) / count


def measure_steps(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    periods: Mapping[str, int],
    rounds: int,
    budget_s: float,
    min_rounds: int = 5,
    on_round: Callable[[int], object] | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Times training steps in turn, round after round.

    Unlike :func:`measure`, on CUDA too the clock is the wall's between two synchronisations: a
    step's launches are part of what it costs.

    Args:
        steps: Name to step; each changes its own model only.
        device: Where they work.
        periods: Name to the number of steps after which costs repeat; a sample is the mean over
            whole periods. 1 where a name is missing.
        rounds: Samples of each step.
        budget_s: No round begins after this wall clock, but ``min_rounds`` there are.
        min_rounds: Rounds whatever the budget, at most ``rounds``.
        on_round: Called after each round with the rounds so far.
        clock: In seconds; None: the wall's; ``time.process_time`` on a CPU that other programs use, too.

    Returns:
        Name to timing, all with equally many samples.
    """
    counts = {}
    is_short = {}
    for name, step in steps.items():
        period = periods.get(name, 1)
        step_seconds(step, 2, device)  # makes optimizer state, faults pages in, chooses kernels
        once = step_seconds(step, period, device)
        counts[name] = period * max(1, math.ceil(MIN_STEP_SAMPLE_S / max(once * period, 1e-9)))
        is_short[name] = once < MIN_STEP_SAMPLE_S
    samples: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + budget_s
    names = list(steps)
    for round_index in range(rounds):
        if round_index >= min_rounds and time.perf_counter() > deadline:
            break
        for name in names:
            if is_short[name]:
                steps[name]()  # untimed: brings the step's own data back into the caches
            samples[name].append(step_seconds(steps[name], counts[name], device, clock))
        names.reverse()  # nobody always follows the same neighbour
        if on_round is not None:
            on_round(round_index + 1)
    return {name: Timing(tuple(values)) for name, values in samples.items()}
