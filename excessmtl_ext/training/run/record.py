"""The folder of a run: what was run, where, what came out, and enough to go on after an interruption."""

from __future__ import annotations

import csv
import io
import json
import math
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
from excessmtl_ext.data.regular_file import open_regular
from excessmtl_ext.training.run.config import FREE_ON_RESUME
from excessmtl_ext.training.run.files import (
    append_bytes,
    finite_or_none,
    read_json,
    read_table,
    write_atomically,
    write_json,
)
from excessmtl_ext.training.run.schema import AtLeast, Nullable

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.csv"
TASK_WEIGHTS = "task_weights.csv"
TIMES = "times.csv"
TABLES = (METRICS, TASK_WEIGHTS, TIMES)
FINAL_METRICS = "metrics.json"
CHECKPOINT = "checkpoint.pt"
BEST_MODEL = "best_model.pt"
FIGURE = "training.png"
BALANCER_REPORT = "balancer_report.json"

# A folder without a config.json that has one of these holds something else than a run.
REPLACED = (ENVIRONMENT, *TABLES, FINAL_METRICS, CHECKPOINT, BEST_MODEL, FIGURE, BALANCER_REPORT)

_CONFIG_SCHEMA = {
    "dataset": str,
    "method": str,
    "epochs": AtLeast(1),
    "batch_size": AtLeast(1),
    "noise": float,
    "seed": int,
    "task": Nullable(str),
}

_SESSIONS_SCHEMA = {"sessions": [{"commit": Nullable(str), "versions": dict}]}

# Raised when the meaning of a checkpoint's entries changes.
CHECKPOINT_VERSION = 2

# Enough to tell two floats of an accuracy or a float32 loss apart, without 17 digits of noise.
_FLOAT_FORMAT = ".9g"

_VERSIONS_OF = ("excessmtl-ext", "numpy", "scikit-learn", "torchvision", "torchjd")


class RunRecord:
    """Writes one run's files; makes sure that two runs never mix in one folder, and replaces nobody else's files.

    Making one only reads and checks. `begin` then writes; until then a run that is refused has changed nothing.

    Every file is replaced as a whole or only ever appended to. A checkpoint counts the rows that the tables had when
    it was made, and resuming cuts them back to that, so that a killed run leaves no row twice. The first checkpoint is
    saved before the first row: rows without a checkpoint are those of a run whose checkpoint was lost.

    Args:
        folder: May not exist yet.
        config: All values of the run, JSON types.
        resume: Go on from the folder's checkpoint; start from the beginning where there is none.

    Attributes:
        checkpoint: What to go on from; None for a run from the beginning.

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is False, or files of somebody else.
        ValueError: the folder holds a run of another config, or its files do not belong together.
    """

    def __init__(
        self, folder: str | Path, config: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.checkpoint: dict[str, Any] | None = None
        # As JSON gives it back: a tuple is a list then, and compares as one.
        self._config = json.loads(json.dumps(config, allow_nan=False))
        self._num_rows: dict[str, int] = {}
        self._kept: dict[str, bytes] = {}  # of the tables; until they have been cut back
        check_folder(self.folder, resume=resume)
        if os.path.lexists(self.folder / CONFIG):
            _check_same_config(self.folder, read_config(self.folder), self._config)
            self.checkpoint = self._load_checkpoint()
            self._sessions = read_sessions(self.folder)
            self._check_files()
        else:
            self._sessions = []

    def begin(self) -> None:
        """Makes the folder that of this session: writes its settings, and cuts the tables back to the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._kept.items():
            if content:
                write_atomically(
                    self.folder / name, lambda file, content=content: file.write(content)
                )
            else:
                (self.folder / name).unlink(missing_ok=True)
        self._kept.clear()
        write_json(self.folder / CONFIG, self._config)
        # A resumed run has several sessions.
        session = describe_environment(str(self._config.get("device", "cpu")))
        write_json(
            self.folder / ENVIRONMENT, finite_or_none({"sessions": [*self._sessions, session]})
        )

    def append(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Adds rows to one of the tables; the first call writes the header.

        Args:
            name: File name of the table.
            columns: Its header, the same at each call.
            rows: Values in the order of the columns.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if name not in self._num_rows:
            writer.writerow(columns)
        num_new = 0
        for row in rows:
            writer.writerow([format(v, _FLOAT_FORMAT) if isinstance(v, float) else v for v in row])
            num_new += 1
        # On the disk before the checkpoint that counts these rows.
        append_bytes(self.folder / name, text.getvalue().encode())
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
        """Returns the rows of metrics.csv so far; of a run that has not begun, those that it will keep."""
        needs = ("epoch", "step")
        return read_table(self.folder / METRICS, needs=needs, content=self._kept.get(METRICS))

    def last_row(self, num_epochs: int, metric: str) -> dict[str, float]:
        """Returns the row of metrics.csv of the last of ``num_epochs`` finished epochs; empty where these are none.

        Raises:
            ValueError: the table does not have one row with ``metric`` for each epoch.
        """
        rows = self.read_metrics() if num_epochs else []
        epochs = [row["epoch"] for row in rows]
        if epochs != list(range(1, num_epochs + 1)) or any(metric not in row for row in rows[:1]):
            raise ValueError(
                f"Expected {self.folder / METRICS} to have a column {metric} and a row of each of {num_epochs} "
                f"finished epochs, but got those of {epochs[:20]}. Was it edited? Start the run again in another "
                "folder."
            )
        return rows[-1] if rows else {}

    def _load_checkpoint(self) -> dict[str, Any] | None:
        path = self.folder / CHECKPOINT
        if not os.path.lexists(path):
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
            name in TABLES and type(count) is int and count >= 0 for name, count in num_rows.items()
        ):
            raise ValueError(
                f"Expected {path} to count the rows of {', '.join(TABLES)}, but got {num_rows!r}. "
                "Delete the folder and start the run again."
            )
        return {**checkpoint, "num_rows": num_rows}

    def _check_files(self) -> None:
        """Raises ValueError where a file that the checkpoint stands on has been lost or cut."""
        if self.checkpoint is None:
            rows = [name for name in (*TABLES, BEST_MODEL) if os.path.lexists(self.folder / name)]
            if rows:
                raise ValueError(
                    f"Expected {self.folder / CHECKPOINT} beside {', '.join(rows)}, but it is missing: what the run "
                    "has reached cannot be gone on from. Take it from a copy, or name another folder."
                )
            return
        self._kept = self._read_kept_rows(self.checkpoint["num_rows"])
        self._num_rows = dict(self.checkpoint["num_rows"])
        best_model = self.folder / BEST_MODEL
        score = self.checkpoint.get("best_score")
        if not isinstance(score, float) or math.isinf(score):
            return  # no epoch has been the best yet; what is no number is found by who restores the state
        try:
            _check_archive(best_model)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"Expected {best_model} to be the model that did best so far, with a validation score of "
                f"{score:.4f}, but it cannot be read ({error}). Take it from a copy, or start the run again in "
                "another folder."
            ) from error

    def _read_kept_rows(self, counts: Mapping[str, int]) -> dict[str, bytes]:
        """Returns what stays of each table: the rows that the checkpoint counts; nothing where it does not name it."""
        kept: dict[str, bytes] = dict.fromkeys(TABLES, b"")
        for name, count in counts.items():
            path = self.folder / name
            lines = _read_lines(path)
            if len(lines) < count + 1:
                raise ValueError(
                    f"Expected {path} to have the {count} rows that its checkpoint counts, "
                    f"but got {max(len(lines) - 1, 0)}. Was it edited? Start the run again in another folder."
                )
            kept[name] = b"".join(lines[: count + 1])
        return kept


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raises where a run in ``folder`` would mix with another one or replace the files of somebody else.

    Raises:
        FileExistsError: it holds a run and ``resume`` is False, or no run but a file that one would replace.
        ValueError: it holds a config.json that no run has written.
    """
    if not os.path.lexists(folder / CONFIG):
        foreign = [name for name in REPLACED if os.path.lexists(folder / name)]
        if foreign:
            raise FileExistsError(
                f"Expected `output` without files of other programs, but {folder} holds {', '.join(foreign)} and no "
                f"{CONFIG} of a run. Move them elsewhere, or name another folder."
            )
    elif not resume:
        raise FileExistsError(
            f"Expected `output` without a run in it, but {folder} holds one already. "
            "Pass --resume to go on with it, or name another folder."
        )
    else:
        read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not that of a run.
    """
    return read_json(folder / CONFIG, schema=_CONFIG_SCHEMA)


def best_epoch(rows: Sequence[dict[str, float]], metric: str) -> dict[str, float] | None:
    """Returns the row with the highest finite value of ``metric``, the first of equals; None if none is finite."""
    finite = [row for row in rows if math.isfinite(row[metric])]
    return max(finite, key=lambda row: (row[metric], -row["epoch"]), default=None)


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """Reads where a run was made, one entry per start; empty where it does not say.

    Raises:
        ValueError: environment.json is not that of a run.
    """
    path = folder / ENVIRONMENT
    if not os.path.lexists(path):
        return []
    return read_json(path, schema=_SESSIONS_SCHEMA)["sessions"]


def _read_lines(path: Path) -> list[bytes]:
    """Returns the whole lines of a table; none where there is no such file."""
    if not os.path.lexists(path):
        return []
    with open_regular(path) as file:
        return [line for line in file if line.endswith(b"\n")]


def _check_archive(path: Path) -> None:
    """Raises unless every entry has its checksum: torch compares none, and would load a flipped bit as it is."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        # torch packs nothing. What is packed can unpack to more than the memory holds.
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type]
        if packed:
            raise ValueError(f"its entry {packed[0]} is compressed")
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
