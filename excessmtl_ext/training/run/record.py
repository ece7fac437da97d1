"""The folder of a run: what was run, where, what came out, and enough to go on after an interruption."""

from __future__ import annotations

import csv
import io
import os
import pickle
import platform
import subprocess
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from excessmtl_ext._extension import build_info, unavailable_reason
from excessmtl_ext.training.run.config import FREE_ON_RESUME
from excessmtl_ext.training.run.files import read_json, read_table, write_atomically, write_json

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.csv"
TASK_WEIGHTS = "task_weights.csv"
TIMES = "times.csv"
TABLES = (METRICS, TASK_WEIGHTS, TIMES)
FINAL_METRICS = "metrics.json"
CHECKPOINT = "checkpoint.pt"
BEST_MODEL = "best_model.pt"

# Raised when the meaning of a checkpoint's entries changes.
CHECKPOINT_VERSION = 2

# Enough to tell two floats of an accuracy or a float32 loss apart, without 17 digits of noise.
_FLOAT_FORMAT = ".9g"

_VERSIONS_OF = ("excessmtl-ext", "numpy", "scikit-learn", "scipy", "torchvision", "torchjd")


class RunRecord:
    """Writes one run's files; makes sure that two runs never mix in one folder.

    Every file is replaced as a whole or only ever appended to. A checkpoint counts the rows that the tables had when
    it was made, and resuming cuts them back to that, so that a killed run leaves no row twice.

    Args:
        folder: Made if it does not exist.
        config: All values of the run, JSON types.
        resume: Go on from the folder's checkpoint; start from the beginning where there is none.

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is False.
        ValueError: the folder holds a run of another config, or its files do not belong together.
    """

    def __init__(
        self, folder: str | Path, config: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.checkpoint: dict[str, Any] | None = None
        self._num_rows: dict[str, int] = {}
        path = self.folder / CONFIG
        if path.is_file():
            if not resume:
                raise FileExistsError(
                    f"Expected `output` without a run in it, but {self.folder} holds one already. "
                    "Pass --resume to go on with it, or name another folder."
                )
            _check_same_config(self.folder, read_json(path), config)
            self.checkpoint = self._load_checkpoint()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint is None:
            for name in TABLES:
                (self.folder / name).unlink(missing_ok=True)
        else:
            for name, num_rows in self.checkpoint["num_rows"].items():
                self._cut_back(name, num_rows)
        write_json(path, config)
        self._add_session(str(config.get("device", "cpu")))

    def append(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Adds rows to one of the tables; the first call writes the header.

        Args:
            name: File name of the table.
            columns: Its header, the same at each call.
            rows: Values in the order of the columns.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        path = self.folder / name
        if not path.is_file():
            writer.writerow(columns)
        num_new = 0
        for row in rows:
            writer.writerow([format(v, _FLOAT_FORMAT) if isinstance(v, float) else v for v in row])
            num_new += 1
        with path.open("a", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that counts these rows
        self._num_rows[name] = self._num_rows.get(name, 0) + num_new

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint: tensors, numbers, strings, and lists and dicts of them."""
        content = {
            **state,
            "version": CHECKPOINT_VERSION,
            "num_rows": dict(self._num_rows),
        }
        write_atomically(self.folder / CHECKPOINT, lambda file: torch.save(content, file))

    def save_best_model(self, state: Mapping[str, Any]) -> None:
        """Replaces the model that did best on validation."""
        write_atomically(self.folder / BEST_MODEL, lambda file: torch.save(dict(state), file))

    def write_final_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Writes the numbers to report."""
        write_json(self.folder / FINAL_METRICS, metrics)

    def read_metrics(self) -> list[dict[str, float]]:
        """Returns the rows of metrics.csv so far."""
        return read_table(self.folder / METRICS)

    def _load_checkpoint(self) -> dict[str, Any] | None:
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return None
        try:
            _check_archive(path)
            # Never unpickled freely: a pickle can run code.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            version, num_rows = checkpoint["version"], checkpoint.get("num_rows", {})
        except Exception as error:  # of a damaged file torch raises whatever its parser trips over
            # Not torch's own words for a pickle of something else: they advise to load it all the same.
            has_code = isinstance(error, pickle.UnpicklingError)
            reason = "it holds more than tensors and numbers" if has_code else error
            raise ValueError(
                f"Expected {path} to be a checkpoint of a training run, but it cannot be read ({reason}). "
                "Delete the folder and start the run again."
            ) from error
        if version != CHECKPOINT_VERSION:
            raise ValueError(
                f"Expected version {CHECKPOINT_VERSION} in {path}, but got {version}: it was written by another "
                "version of this package. Resume with that one, or start the run again."
            )
        # Names of files come from the checkpoint: only those of this folder are touched.
        if not isinstance(num_rows, dict) or not all(
            name in TABLES and isinstance(count, int) and count >= 0
            for name, count in num_rows.items()
        ):
            raise ValueError(
                f"Expected {path} to count the rows of {', '.join(TABLES)}, but got {num_rows!r}. "
                "Delete the folder and start the run again."
            )
        return checkpoint

    def _cut_back(self, name: str, num_rows: int) -> None:
        """Removes rows that were written after the checkpoint."""
        path = self.folder / name
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if len(lines) < num_rows + 1:
            raise ValueError(
                f"Expected {path} to have the {num_rows} rows that its checkpoint counts, "
                f"but got {max(len(lines) - 1, 0)}. Was it edited? Start the run again in another folder."
            )
        content = b"".join(lines[: num_rows + 1])
        write_atomically(path, lambda file: file.write(content))
        self._num_rows[name] = num_rows

    def _add_session(self, device: str) -> None:
        """Notes where this session runs; a resumed run has several."""
        path = self.folder / ENVIRONMENT
        sessions = []
        if self.checkpoint is not None and path.is_file():
            sessions = read_json(path, "sessions")["sessions"]
        sessions.append(describe_environment(device))
        write_json(path, {"sessions": sessions})


def _check_archive(path: Path) -> None:
    """Raises unless every entry has its checksum: torch compares none, and would load a flipped bit as it is."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its entry {damaged} is wrong")


def describe_environment(device: str) -> dict[str, Any]:
    """Returns what a reader needs to judge or repeat a run's numbers: commit, dirty flag, versions, device."""
    commit, is_dirty = _commit()
    is_cuda = torch.device(device).type == "cuda"
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "is_dirty": is_dirty,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # the wheel's metadata does not name its CUDA build
            **{name: _version(name) for name in _VERSIONS_OF},
            "cuda": torch.version.cuda,
        },
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "compiled_ops": unavailable_reason if build_info is None else asdict(build_info),
        "num_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _check_same_config(folder: Path, saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    names = sorted((saved.keys() | config.keys()) - FREE_ON_RESUME)
    different = [name for name in names if saved.get(name) != config.get(name)]
    if different:
        changes = "; ".join(
            f"`{name}`: {saved.get(name)!r} there, {config.get(name)!r} here" for name in different
        )
        raise ValueError(
            f"Expected the config of the run in {folder}, but got another: {changes}. "
            "Resume with the same values, or name another folder."
        )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool | None]:
    """Returns the commit this file was checked out from, and whether the checkout differs from it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed copy may lie in an environment inside somebody else's repository: that commit is not ours.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
