"""Which trials a benchmark consists of, in which order, and which of them are finished."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from excessmtl_ext.training.benchmark.datasets import Dataset, find_datasets
from excessmtl_ext.training.benchmark.methods import Method, find_methods
from excessmtl_ext.training.benchmark.own_file import content_hash
from excessmtl_ext.training.benchmark.trial import Trial
from excessmtl_ext.training.run.files import read_json

TRIALS = "trials"
TUNING_SEED = 100
"""Seed of the trials that choose a setting; none of the seeds that are reported."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is compared on what.

    Attributes:
        datasets: Keys and Python files, see `find_datasets`.
        methods: Keys and Python files, see `find_methods`.
        num_seeds: Seeds 0 to ``num_seeds - 1`` are reported.
        data_root: Folder of the data sets that must be on disk; without it they are left out.
        is_quick: Fewer samples and epochs: shows that it works, and says little.
    """

    datasets: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    num_seeds: int = 5
    data_root: str | None = None
    is_quick: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        if not 1 <= self.num_seeds < TUNING_SEED:
            raise ValueError(
                f"Expected `num_seeds` in [1, {TUNING_SEED - 1}], but got {self.num_seeds}."
            )

    @cached_property
    def found_datasets(self) -> dict[str, Dataset]:
        """Data sets by key, without those whose data are not on disk."""
        return {
            key: dataset
            for key, dataset in find_datasets(self.datasets).items()
            if self.data_root is not None or not dataset.needs_data_root
        }

    @cached_property
    def found_methods(self) -> dict[str, Method]:
        """Methods by key, without those whose packages are missing."""
        return {
            key: method
            for key, method in find_methods(self.methods).items()
            if method.missing() is None
        }

    def left_out(self) -> list[str]:
        """Returns a line for each data set and method that cannot run here, with the reason."""
        lines = [
            f"{dataset.title}: needs its data on disk, pass --data-root"
            for key, dataset in find_datasets(self.datasets).items()
            if key not in self.found_datasets
        ]
        return lines + [
            f"{method.label}: {method.missing()}"
            for key, method in find_methods(self.methods).items()
            if key not in self.found_methods
        ]


class Plan:
    """The trials of a benchmark and their files.

    The setting of a method is chosen for each data set by the trials of one seed at the noisy dose: the best mean score
    of any epoch on the validation labels that a user would have. Then the chosen setting is trained at every dose and
    with every seed.

    Args:
        config: What is compared on what.
        output: Folder of the benchmark.
    """

    def __init__(self, config: BenchmarkConfig, output: Path) -> None:
        self.config, self.output = config, output
        self._finished: dict[Trial, dict[str, Any]] = {}
        files = [Path(name) for name in (*config.datasets, *config.methods) if name.endswith(".py")]
        self._own_files = [content_hash(path) for path in files]

    def path(self, trial: Trial) -> Path:
        """Returns the file of a trial's result."""
        return self.output / TRIALS / f"{trial.name}.json"

    def fingerprint(self, trial: Trial) -> str:
        """Returns what must be equal for a result to be this trial's: everything that decides its numbers."""
        dataset = self.config.found_datasets[trial.dataset]
        plain = {
            name: value
            for name, value in vars(dataset).items()
            if isinstance(value, (int, float, str, tuple))
        }
        facts = {
            "trial": asdict(trial),
            "dataset": plain,
            "dose": dataset.doses[trial.dose],
            "setting": self.config.found_methods[trial.method].settings[trial.setting],
            "own_files": self._own_files,
            "version": _version(),
        }
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def result(self, trial: Trial) -> dict[str, Any] | None:
        """Returns the finished result of a trial; None where there is none, or of other settings or another version.

        Raises:
            ValueError: the file is damaged; says which.
        """
        if trial not in self._finished:
            path = self.path(trial)
            if not path.is_file():
                return None
            content = read_json(path, "fingerprint", "trial")
            if content["fingerprint"] != self.fingerprint(trial):
                return None
            self._finished[trial] = content
        return self._finished[trial]

    def tuning_trials(self, dataset: str, method: str) -> list[Trial]:
        """Returns the trials that choose a method's setting; none where it has only one."""
        count = len(self.config.found_methods[method].settings)
        if count < 2:
            return []
        dose = self.config.found_datasets[dataset].ranked_dose
        return [
            Trial(dataset, dose, method, number, TUNING_SEED, self.config.is_quick)
            for number in range(count)
        ]

    def choice(self, dataset: str, method: str) -> int | None:
        """Returns the number of the chosen setting; None while a trial that decides is missing."""
        trials = self.tuning_trials(dataset, method)
        scores = []
        for trial in trials:
            result = self.result(trial)
            if result is None:
                return None
            scores.append(best_observed(result))
        # The first of equals.
        return max(range(len(scores)), key=lambda number: (scores[number], -number), default=0)

    def reported_trials(self, dataset: str, method: str, setting: int) -> list[Trial]:
        """Returns the trials of a method on a data set with the chosen setting."""
        return [
            Trial(dataset, dose, method, setting, seed, self.config.is_quick)
            for seed in range(self.config.num_seeds)
            for dose in self.config.found_datasets[dataset].doses
        ]

    def pairs(self) -> list[tuple[str, str]]:
        """Returns data sets and methods, so that every data set has a first result early."""
        return [
            (dataset, method)
            for method in self.config.found_methods
            for dataset in self.config.found_datasets
        ]

    def waiting(self) -> list[Trial]:
        """Returns the trials that can be run now: those that choose, then those that are reported."""
        tuning: list[Trial] = []
        reported: list[Trial] = []
        for dataset, method in self.pairs():
            setting = self.choice(dataset, method)
            if setting is None:
                tuning += self.tuning_trials(dataset, method)
            else:
                reported += self.reported_trials(dataset, method, setting)
        # All first seeds before all second ones: a benchmark that is stopped early is whole, with fewer seeds.
        reported.sort(key=lambda trial: trial.seed)
        return [trial for trial in (*tuning, *reported) if self.result(trial) is None]

    def num_trials(self) -> int:
        """Returns the number of trials of the whole benchmark."""
        return sum(
            len(self.tuning_trials(dataset, method)) + len(self.reported_trials(dataset, method, 0))
            for dataset, method in self.pairs()
        )

    def num_finished(self) -> int:
        """Returns how many of them are finished."""
        finished = 0
        for dataset, method in self.pairs():
            trials = self.tuning_trials(dataset, method)
            setting = self.choice(dataset, method)
            trials += [] if setting is None else self.reported_trials(dataset, method, setting)
            finished += sum(self.result(trial) is not None for trial in trials)
        return finished


def _version() -> str:
    try:
        return version("excessmtl-ext")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"


def best_observed(result: Mapping[str, Any]) -> float:
    """Returns the best mean score of any epoch on the validation labels that a user would have; -inf if it diverged."""
    if "diverged" in result:
        return -math.inf
    return max((mean_score(row, "observed") for row in result["epochs"]), default=-math.inf)


def mean_score(row: Mapping[str, Any], split: str, tasks: Iterable[str] | None = None) -> float:
    """Returns the mean score of an epoch over tasks; -inf where one is not a number.

    Args:
        row: An epoch of a result.
        split: ``"test"``, ``"validation"`` or ``"observed"``.
        tasks: Names; None for all.
    """
    scores: Mapping[str, float | None] = row["scores"][split]
    values: Sequence[float | None] = [scores[name] for name in (scores if tasks is None else tasks)]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else -math.inf
