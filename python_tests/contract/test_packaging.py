"""What is published: equal bytes from any folder, complete, free of this machine's paths, with the right version.

A checkout is copied, and its sdist unpacked elsewhere; each gives a wheel (CPU ops only). ``EXCESSMTL_OTHER_PYTHONS``
may name interpreters with other releases of torch, separated by ``os.pathsep``, in which that wheel is then loaded.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from _paths import ROOT

from excessmtl_ext import baselines
from excessmtl_ext._build_facts import source_digest

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
OTHER_PYTHONS = [p for p in os.environ.get("EXCESSMTL_OTHER_PYTHONS", "").split(os.pathsep) if p]
BUILD_PACKAGES = ("scikit_build_core", "pybind11", "setuptools_scm")


def environment(**variables: str) -> dict[str, str]:
    """This process's, with nothing in it that steers a build or an import."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EXCESSMTL_", "GIT_"))}
    kept.pop("PYTHONPATH", None)
    return kept | variables


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment(**variables), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def skip_without(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def copy_checkout(target: Path) -> Path:
    """The files of this checkout, without its history and what git ignores."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
        names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if "__pycache__" not in name and not name.endswith(".so")]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


# ---- the built files


class Built(NamedTuple):
    checkout: Path
    sdists: list[Path]  # from the copied checkout, and from a second copy in another folder
    wheels: list[Path]  # from the copied checkout, and from the unpacked sdist


BACKEND = """
import sys
sys.path.insert(0, "_build_backend")
import backend
settings = {"cmake.define.EXCESSMTL_TORCH_TARGET": "2.10"}
backend.build_sdist(sys.argv[1])
if sys.argv[2:]:
    backend.build_wheel(sys.argv[2], settings)
"""


# A machine without a GPU, where nobody asks for CUDA ops; the toolkit may be there.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1", "CUDAARCHS": "", "TORCH_CUDA_ARCH_LIST": ""}


def build(folder: Path, sdists: Path, *wheels: Path) -> None:
    run(
        sys.executable, "-c", BACKEND, sdists, *wheels,
        cwd=folder, **NO_GPU, SOURCE_DATE_EPOCH="1700000000",
    )  # fmt: skip


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Unpacks an archive of our own; with the filter that Python 3.10.12 and 3.11.4 brought, where there is one."""
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    archive.extractall(folder, **safe)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    skip_without(*BUILD_PACKAGES)
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    base = tmp_path_factory.mktemp("packaging")
    first, second = copy_checkout(base / "first"), copy_checkout(base / "a" / "deeper" / "second")
    build(first, base / "sdist_1", base / "wheel_1")
    build(second, base / "sdist_2")
    (sdist,) = (base / "sdist_1").iterdir()
    with tarfile.open(sdist) as archive:
        unpack(archive, base / "unpacked")
    (unpacked,) = (base / "unpacked").iterdir()
    build(unpacked, base / "sdist_3", base / "wheel_2")
    return Built(
        first,
        [next((base / name).iterdir()) for name in ("sdist_1", "sdist_2")],
        [next((base / name).iterdir()) for name in ("wheel_1", "wheel_2")],
    )


@pytest.mark.slow
def test_builds_in_different_folders_are_byte_for_byte_equal(built):
    assert built.sdists[0].name == built.sdists[1].name
    assert built.sdists[0].read_bytes() == built.sdists[1].read_bytes()
    assert built.wheels[0].name == built.wheels[1].name
    with zipfile.ZipFile(built.wheels[0]) as one, zipfile.ZipFile(built.wheels[1]) as other:
        assert one.namelist() == other.namelist()
        assert [n for n in one.namelist() if one.read(n) != other.read(n)] == []
    assert built.wheels[0].read_bytes() == built.wheels[1].read_bytes()


@pytest.mark.slow
def test_wheel_names_no_folder_of_this_machine(built):
    folders = {built.checkout.parent, Path(sys.prefix), Path(sys.base_prefix), Path.home()}
    folders |= {Path(torch.__file__).parent}
    needles = [str(folder).encode() for folder in folders if len(folder.parts) > 2]
    assert len(needles) >= 3
    with zipfile.ZipFile(built.wheels[0]) as wheel:
        found = [
            (name, needle)
            for name in wheel.namelist()
            for needle in [*needles, b"/home/", b"/root/", b"/tmp/"]
            if needle in wheel.read(name)
        ]
    assert not found


@pytest.mark.slow
def test_wheel_holds_package_licences_and_the_sources_of_the_jit_build(built):
    with zipfile.ZipFile(built.wheels[0]) as wheel:
        held = set(wheel.namelist())
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "excessmtl_ext").rglob("*.py")}
    sources = {f"excessmtl_ext/{p.relative_to(ROOT)}" for p in (ROOT / "csrc").rglob("*.*")}
    expected = package | sources | {"excessmtl_ext/py.typed", "excessmtl_ext/_ops.so"}
    assert {name for name in held if ".dist-info/" not in name and "/_C." not in name} == expected
    assert len(sources) > 30
    info = {name.partition(".dist-info/")[2] for name in held if ".dist-info/" in name}
    assert {"licenses/LICENSE", "licenses/NOTICES", "entry_points.txt", "METADATA"} <= info


@pytest.mark.slow
def test_sdist_holds_the_checkout_but_for_the_settings_of_its_host(built):
    with tarfile.open(built.sdists[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    there = {str(path.relative_to(built.checkout)) for path in built.checkout.rglob("*")}
    left_out = {name for name in there - held if (built.checkout / name).is_file()}
    assert held <= there
    stray = {name for name in left_out if not name.startswith((".ci/", ".git", ".pre-commit"))}
    assert stray == set()


@pytest.mark.slow
@pytest.mark.parametrize("python", [sys.executable, *OTHER_PYTHONS])
def test_wheel_loads_its_ops_without_a_warning(built, tmp_path, python):
    with zipfile.ZipFile(built.wheels[0]) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]; "
        "import dataclasses, json; from excessmtl_ext import _extension as e; "
        "print(e.__file__); print(json.dumps(dataclasses.asdict(e.build_info)))"
    )
    said = run(python, "-W", "error", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    origin, facts = said.splitlines()
    assert origin == str(tmp_path / "excessmtl_ext" / "_extension.py")
    info = json.loads(facts)
    assert info["source_digest"] == source_digest(tmp_path / "excessmtl_ext" / "csrc")
    assert not info["has_cuda"]
    assert info["cuda_decision"].startswith("no GPU was found, and neither TORCH_CUDA_ARCH_LIST")


@pytest.mark.slow
def test_ops_need_torch_and_the_c_runtime_and_search_in_no_folder(built, tmp_path):
    """What auditwheel is told to leave out is torch, which a dependency brings and the package imports first."""
    skip_without("elftools")
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(built.wheels[0]) as wheel:
        wheel.extractall(tmp_path)
    for path in (tmp_path / "excessmtl_ext").glob("*.so"):
        with path.open("rb") as file:
            tags = list(ELFFile(file).get_section_by_name(".dynamic").iter_tags())
        needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
        assert not [t for t in tags if t.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")], path.name
        runtime = {
            n for n in needed if re.match(r"(libc|libm|libstdc\+\+|libgcc_s|ld-linux.*)\.so", n)
        }
        assert needed - runtime <= {"libtorch_cpu.so"}, path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("twine", ["-m", "twine", "check", "--strict"]),
        ("check_wheel_contents", ["-m", "check_wheel_contents"]),
        ("auditwheel", ["-m", "auditwheel", "show"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_packagers_tools_find_no_fault(built, package, command):
    skip_without(package)
    if package == "auditwheel" and not sys.platform.startswith("linux"):
        pytest.skip("wheels are audited on Linux")
    wheel = built.wheels[0]
    said = run(sys.executable, *command, wheel, cwd=wheel.parent)
    if package == "auditwheel":
        assert re.search(r'tag.*"manylinux_2_\d+_|tag: "linux', said.replace("\n", " ")), said


# ---- the metadata


def test_pyproject_is_valid():
    skip_without("validate_pyproject")
    run(sys.executable, "-m", "validate_pyproject", ROOT / "pyproject.toml", cwd=ROOT)


def extras() -> dict[str, set[str]]:
    """The distributions that each extra names, and the project's own dependencies under ""."""
    text = re.sub(r"#.*", "", PYPROJECT)
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    lists = dict(re.findall(r"^([\w-]+) = (\[.*?^\])", table, flags=re.MULTILINE | re.DOTALL))
    lists[""] = re.search(r"^dependencies = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)[1]
    return {
        extra: {
            re.match(r"[\w.-]+(\[[\w,-]+\])?", item)[0].lower() for item in ast.literal_eval(items)
        }
        for extra, items in lists.items()
    }


def imported(*folders: str) -> set[str]:
    """The distributions whose packages the Python files under these folders import."""
    distributions = {"sklearn": "scikit-learn", "PIL": "pillow"}
    names: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    own = {
        path.stem
        for folder in ("bench", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in ("", ".py")
    }
    names -= set(sys.stdlib_module_names) | own | {"excessmtl_ext", "LibMTL"}  # GitHub only
    return {distributions.get(name, name) for name in names}


def test_extras_name_what_their_folders_import_and_nothing_else():
    declared = extras()
    package = Path("excessmtl_ext")
    training = imported(
        *(str(package / part) for part in ("data", "models", "training", "baselines"))
    )
    assert training - declared[""] == declared["train"]
    assert imported("excessmtl_ext/integrations") - declared[""] == declared["integrations"]
    assert imported("bench") - declared[""] == declared["bench"]
    core = {
        path.stem: ast.parse(path.read_text(encoding="utf-8"))
        for path in (ROOT / package).glob("*.py")
    }
    for name, module in core.items():  # at the top of a module: `import excessmtl_ext` must do
        heads = {
            alias.name.partition(".")[0]
            for node in module.body if isinstance(node, ast.Import) for alias in node.names
        } | {
            (node.module or "").partition(".")[0]
            for node in module.body if isinstance(node, ast.ImportFrom)
        }  # fmt: skip
        assert heads <= set(sys.stdlib_module_names) | {"torch", "excessmtl_ext"}, name


def test_no_text_promises_an_index_that_does_not_have_the_package():
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts += [p for name in ("excessmtl_ext", "examples") for p in (ROOT / name).rglob("*.py")]
    promise = re.compile(r"pip install [^`\n]*excessmtl[-_]ext\b")
    found = [str(path) for path in texts if promise.search(path.read_text(encoding="utf-8"))]
    assert not found


def test_every_bound_has_its_reason_beside_it():
    for line in PYPROJECT.splitlines():
        if re.match(r'\s+"[\w-]+[<>=].*",', line) and "extra" not in line:
            assert "# " in line, line


def test_version_to_come_licence_and_credits_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)[1]
    assert f"\nversion: {newest}\n" in citation
    assert f'\nfallback_version = "{newest}.dev0"\n' in PYPROJECT
    assert '\nlicense = "MIT"\n' in PYPROJECT
    assert "\nlicense: MIT\n" in citation
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    credits = (ROOT / "NOTICES").read_text(encoding="utf-8")
    for method in [*baselines.__all__, "ExcessMTL"]:
        if method not in ("Uniform", "FixedWeights", "SingleTask"):  # nobody's
            assert f"\n{method}\n" in credits


# ---- the version


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository with the files that decide the version, and one commit."""
    skip_without("setuptools_scm")
    if shutil.which("git") is None:
        pytest.skip("no git")
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("pyproject.toml", ".gitattributes", ".git_archival.txt"):
        if not (ROOT / name).exists():
            pytest.skip("an unpacked sdist: its version stands in PKG-INFO")
        shutil.copy(ROOT / name, folder)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return run("git", *name, *arguments, cwd=folder, GIT_CONFIG_GLOBAL=os.devnull)


def commit(folder: Path) -> None:
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "one")


def version(folder: Path, **variables: str) -> str:
    said = run(sys.executable, "-m", "setuptools_scm", cwd=folder, **variables)
    return said.splitlines()[-1]


NEXT = (
    re.search(r'fallback_version = "(.*)\.dev0"', PYPROJECT)[1] if "fallback" in PYPROJECT else ""
)


def test_a_tag_is_the_version_and_later_commits_count_from_it(repository):
    git(repository, "tag", "v1.2.3")
    assert version(repository) == "1.2.3"
    commit(repository)
    assert re.fullmatch(r"1\.2\.4\.dev1\+g[0-9a-f]+", version(repository))


def test_without_a_tag_in_sight_the_version_is_the_one_to_come(repository, tmp_path):
    assert re.fullmatch(rf"{NEXT}\.dev\d+\+g[0-9a-f]+", version(repository))
    git(repository, "tag", "v1.2.3")
    commit(repository)
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", "shallow")
    assert re.fullmatch(rf"{NEXT}\.dev\d+\+g[0-9a-f]+", version(tmp_path / "shallow"))


def test_without_git_the_version_is_the_one_to_come(repository, tmp_path):
    assert version(repository, PATH=str(tmp_path)) == f"{NEXT}.dev0"
    shutil.rmtree(repository / ".git")
    assert version(repository) == f"{NEXT}.dev0"


def test_an_archive_of_a_tag_knows_its_version(repository, tmp_path):
    git(repository, "tag", "v1.2.3")
    git(repository, "archive", "--output", str(tmp_path / "archive.tar"), "HEAD")
    with tarfile.open(tmp_path / "archive.tar") as archive:
        unpack(archive, tmp_path / "archive")
    assert version(tmp_path / "archive") == "1.2.3"
