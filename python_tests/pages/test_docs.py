"""The pages build without a warning, hang together, need no network, and quote what is really in the repository."""

from __future__ import annotations

import ast
import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from _paths import ROOT, find_test_file
from _site import build_site
from _snippets import blocks, run_blocks

import excessmtl_ext
from excessmtl_ext.training.run.workloads import WORKLOADS

DOCS = ROOT / "docs"
# Pages that walk through a program of examples/, which test_examples.py runs.
PROGRAMS = {
    **{page: f"{page.stem}.py" for page in sorted((DOCS / "tutorials").glob("*.md"))},
    DOCS / "distributed.md": "several_processes.py",
}


# ---- what the pages quote


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.stem)
def test_every_block_of_a_guide_is_part_of_its_program(page):
    """Up to indentation."""
    assert f"examples/{PROGRAMS[page]}" in page.read_text(encoding="utf-8")
    program = (ROOT / "examples" / PROGRAMS[page]).read_text(encoding="utf-8")
    assert f"docs/{page.relative_to(DOCS).as_posix()}" in program
    lines = [line.strip() for line in program.splitlines() if line.strip()]
    found = blocks(page, "python")
    assert found
    for block in found:
        quoted = [line.strip() for line in block.splitlines() if line.strip()]
        starts = range(len(lines) - len(quoted) + 1)
        assert any(lines[start : start + len(quoted)] == quoted for start in starts), block


def test_the_quick_start_runs_and_moves_the_weights(capsys):
    names = run_blocks(DOCS / "quickstart.md")
    balancer = names["balancer"]
    assert isinstance(balancer, excessmtl_ext.ExcessMTL)
    assert balancer.num_steps.item() == 100
    assert balancer.task_weights.std() > 0
    printed = capsys.readouterr().out
    assert "speed" in printed
    found = str(names["automatic"]).splitlines()[1:]
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    assert len(found) == 3
    assert all(line in printed and line in text for line in found)
    resumed = excessmtl_ext.ExcessMTL.from_preset(
        "recommended", names["encoder"].parameters(), num_tasks=3
    )
    resumed.load_state_dict(names["checkpoint"]["balancer"])


def test_the_walk_through_an_op_quotes_the_sources():
    page = DOCS / "kernels.md"
    sources = [path.read_text() for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    squeezed = [re.sub(r"\s+", "", source) for source in sources]
    quoted = blocks(page, "cpp")
    assert len(quoted) == 3
    for block in quoted:
        # A string literal may be broken elsewhere.
        text = re.sub(r"\s+", "", block).replace('""', "")
        assert any(text in source.replace('""', "") for source in squeezed), block
    (wrapper,) = blocks(page, "python")
    (shown,) = ast.parse(wrapper).body
    module = ast.parse((ROOT / "excessmtl_ext" / "functional.py").read_text())
    (real,) = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == "fold_"]
    real.body = real.body[1:]  # without its docstring
    assert ast.dump(shown) == ast.dump(real)


def test_every_file_that_the_kernel_and_contribution_pages_name_exists():
    for page in (DOCS / "kernels.md", ROOT / "CONTRIBUTING.md"):
        text = page.read_text(encoding="utf-8")
        names = re.findall(
            r"`((?:csrc|excessmtl_ext|python_tests|bench|docs|examples)/[\w./*]*)`", text
        )
        assert len(names) > 5
        for name in names:
            assert list(ROOT.glob(name.rstrip("/"))), f"{page.name} names {name}"


# Which test runs or compares the Python blocks of a page that has no program.
RUN_BY = {
    "README.md": "test_readme.py",
    "AGENTS.md": "test_agents_page.py",
    "docs/quickstart.md": "test_docs.py",
    "docs/migration.md": "test_migration_page.py",
    "docs/kernels.md": "test_docs.py",
}


def test_no_python_block_of_a_page_is_left_without_a_test():
    tests = {name: find_test_file(name).read_text("utf-8") for name in RUN_BY.values()}
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        if blocks(page, "python") and page not in PROGRAMS:
            name = page.relative_to(ROOT).as_posix()
            assert name in RUN_BY, f"no test runs the Python of {name}"
            assert page.name in tests[RUN_BY[name]]


def shell_words(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, without comments and what follows ``&&``'s first command."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    commands = [part for line in lines for part in re.split(r"&&|;", line.partition("  #")[0])]
    return [command.split() for command in commands if command.strip() and command[0] != "#"]


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))], ids=lambda p: p.stem
)
def test_commands_of_a_page_name_files_modules_and_subcommands_that_exist(page):
    files = (ROOT / "excessmtl_ext" / "training" / "cli").glob("*.py")
    cli = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for words in shell_words(page):
        for word in words:
            if re.fullmatch(r"(bench|docs|examples|python_tests|csrc)/[\w./]+", word):
                assert (ROOT / word).exists(), f"{page.name}: {' '.join(words)}"
        if words[0] == "excessmtl":
            assert re.search(rf"def {words[1]}\b|\"{words[1]}\"", cli), (
                f"{page.name}: {' '.join(words)}"
            )
        if "-m" in words and words[words.index("-m") + 1].startswith("excessmtl_ext"):
            assert importlib.util.find_spec(words[words.index("-m") + 1]), " ".join(words)


def test_every_data_set_of_the_command_is_on_its_page():
    page = (DOCS / "training_runs.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w-]+)` \|", page, flags=re.MULTILINE))
    assert not set(WORKLOADS) - listed, "add a row to the table of docs/training_runs.md"
    assert not listed - set(WORKLOADS)


@pytest.mark.parametrize("name", excessmtl_ext.__all__)
def test_every_public_name_says_what_it_does(name):
    assert (getattr(excessmtl_ext, name).__doc__ or "").strip()


def test_every_committed_timing_is_on_a_page():
    pages = [path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")]
    runs = sorted((ROOT / "bench" / "results").glob("*/README.md"))
    assert len(runs) > 5
    for run in runs:
        assert any(run.relative_to(ROOT).as_posix() in page for page in pages), run


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: p.stem)
def test_links_of_a_page_work_in_the_repository(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not urlsplit(target).scheme:
            name = target.partition("#")[0]
            assert (page.parent / name).exists(), f"{page.name} links to {target}"


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"))


class Page(HTMLParser):
    """The ids of a page, what it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and "href" in given:
            self.loads.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_internal_links_of_the_site_resolve(pages):
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].ids if target in pages else {parts.fragment}
            if not target.exists() or (parts.fragment and parts.fragment not in anchors):
                broken.append((path.name, link))
    assert not broken
    assert sum(len(page.links) for page in pages.values()) > 500


def test_the_site_is_readable_without_a_network(site, pages):
    for path, page in pages.items():
        assert not [name for name in page.loads if urlsplit(name).netloc], path.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), (
            style
        )


def test_every_public_name_has_a_place_in_the_reference(pages):
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api"))
    missing = [
        name
        for name in excessmtl_ext.__all__
        if f"excessmtl_ext.{name}" not in ids and f"module-excessmtl_ext.{name}" not in ids
    ]
    assert not missing


def test_formulas_of_docstrings_are_drawn(site):
    text = (site / "api" / "balancers.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20
    shown = re.sub(r"<(pre|code|span class=\"pre\").*?</\1>", "", text, flags=re.DOTALL)
    assert not re.findall(r"\\(?:alpha|sum|frac|leftarrow|operatorname)\b", shown)


def test_a_formula_that_cannot_be_drawn_is_an_error(monkeypatch):
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed")
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    from mathml import to_mathml  # type: ignore[import-not-found]

    assert "<mfrac>" in to_mathml(r"\frac{1}{2}", is_block=True)
    assert to_mathml(r"a, \\ b", is_block=True).count("<mtr>") == 2
    with pytest.raises(ValueError, match="nosuch"):
        to_mathml(r"a \nosuch b", is_block=False)
