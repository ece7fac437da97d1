"""The report is one file that shows a run's own numbers, asks for nothing else, and looks right in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from excessmtl_ext.data import MultiTaskData
from excessmtl_ext.training import cli
from excessmtl_ext.training.pictures.report import COLOURS, read_content, write_report
from excessmtl_ext.training.pictures.runs import read_run
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.loop import train
from excessmtl_ext.training.run.record import read_table
from excessmtl_ext.training.run.workloads import WORKLOADS

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        dataset="digits",
        method="excessmtl",
        epochs=3,
        batch_size=64,
        lr=1e-3,
        noise=0.8,
        num_train=300,
        task_weight_interval=1,
    )
    train(config, folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


class Page(HTMLParser):
    """What a browser would see: text, the rows of the tables, and every address."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "link", "img", "br", "hr"):
            self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.addresses.append(value or "")
            self.addresses += re.findall(r"url\(['\"]?(.*?)['\"]?\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.addresses += re.findall(r"url\(['\"]?(.*?)['\"]?\)|@import", data)
        elif data.strip():
            self.texts.append(data.strip())
            if self._open[-1] in ("td", "th"):
                self.rows[-1].append(data.strip())

    @property
    def has_open_tags(self) -> bool:
        return bool(self._open)


def test_the_page_is_whole_and_asks_for_nothing(run: Path, tmp_path: Path) -> None:
    page = Page(write_report(run, tmp_path / "report.html"))
    assert not page.has_open_tags
    assert page.addresses, "the figure refers to its own parts"
    assert [address for address in page.addresses if not address.startswith("#")] == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    text = (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in text
    # Names of XML vocabularies are the only addresses anywhere, and nobody fetches those.
    assert set(re.findall(r"""(\S*)=["']https?://""", text)) <= {"xmlns", "xmlns:xlink"}
    assert text.count("http") == len(re.findall(r"""xmlns\S*=["']http""", text)) + text.count(
        "http-equiv"
    )


def test_the_page_shows_the_numbers_of_the_run(run: Path, tmp_path: Path) -> None:
    page = Page(write_report(run, tmp_path / "report.html"))
    metrics = json.loads((run / "metrics.json").read_text())
    selected = metrics["selected"]
    (row,) = (row for row in page.rows if row[0] == "bottom_right (noisy)")
    assert row[1] == f"{selected['test/bottom_right_score']:.4f}"
    assert row[2] == f"accuracy {selected['test/bottom_right_accuracy']:.4f}"
    assert row[4] == f"{selected['balancer/bottom_right_weight']:.4f}"
    assert ["noise", "0.8"] in page.rows
    assert f"Epoch {selected['epoch']:.0f}, selected on validation" in page.texts
    for title in ("Task weight", "Training loss", "Test accuracy", "epoch", "top_left"):
        assert any(title in text for text in page.texts), title
    assert any(text.startswith("Relative excess risk") for text in page.texts)


def test_the_selected_epoch_is_that_of_the_run(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert read_content(run).selected == metrics["selected"]


def test_the_curves_end_where_the_tables_do(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "report.html").read_text()
    # One path of the first task's colour per panel, with a point per row of its table.
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {COLOURS[0].lower()}', text)
    num_points = [len(re.findall(r"[ML] ", path)) for path in paths]
    num_weights = len(read_table(run / "task_weights.csv"))
    assert num_points[:4] == [num_weights, 3, 3, 3]


def test_equal_runs_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert write_report(run, tmp_path / "b.html").read_bytes() == first


def test_a_run_under_way_is_shown_as_such(copy: Path) -> None:
    (copy / "metrics.json").unlink()
    lines = (copy / "metrics.csv").read_text().splitlines(keepends=True)
    (copy / "metrics.csv").write_text("".join(lines[:2]))
    page = Page(write_report(copy))
    assert any(text.startswith("Not finished: 1 of 3 epochs") for text in page.texts)
    assert any("Test score" in text for text in page.texts)
    assert not any("(noisy)" in text for text in page.texts)


def test_a_method_without_risks_has_no_risk_panel(copy: Path) -> None:
    lines = [line.split(",") for line in (copy / "metrics.csv").read_text().splitlines()]
    kept = [index for index, name in enumerate(lines[0]) if "excess_risk" not in name]
    text = "".join(",".join(line[index] for index in kept) + "\n" for line in lines)
    (copy / "metrics.csv").write_text(text)
    page = Page(write_report(copy))
    assert not any("excess risk" in text for text in page.texts)
    assert any("Training loss" in text for text in page.texts)


def test_what_the_config_holds_is_text_and_not_markup(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["data_root"] = '<script>alert("x")</script>'
    (copy / "config.json").write_text(json.dumps(config))
    page = Page(write_report(copy))
    assert "script" not in page.tags
    assert ["data_root", '<script>alert("x")</script>'] in page.rows


def test_no_run_and_no_epoch_are_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected a run in .* no config\.json"):
        write_report(tmp_path)
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="a run with a finished epoch"):
        write_report(tmp_path)


def test_without_matplotlib_the_error_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "\.\[train\]" in a clone'):
        write_report(run, tmp_path / "report.html")


def test_the_command_writes_the_page_and_names_it(copy: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["report", str(copy)])
    assert result.exit_code == 0, result.output
    assert result.output == f"Report: {copy / 'report.html'}\n"
    assert (copy / "report.html").is_file()
    result = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: Expected a run in {tmp_path}")


def test_a_browser_shows_the_page(run: Path, tmp_path: Path) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    path = write_report(run, tmp_path / "report.html")
    options = [
        "--headless",
        "--no-sandbox",  # containers and root allow none; the page is ours
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]

    def open_page(*more: str) -> subprocess.CompletedProcess[str]:
        command = [browser, *options, *more, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    dom = open_page("--dump-dom")
    assert "CONSOLE" not in dom.stderr, dom.stderr  # nothing was refused, nothing failed
    assert dom.stdout.count("<svg") == 1
    assert dom.stdout.count("<tr") == len(Page(path).rows)

    screenshot = tmp_path / "page.png"
    open_page(f"--screenshot={screenshot}", "--window-size=1200,1600", "--hide-scrollbars")
    image = image_module.open(screenshot).convert("RGB")
    counts = {colour: count for count, colour in image.getcolors(image.width * image.height)}
    for colour in COLOURS[:2]:  # both tasks' curves are on the screen
        channels = tuple(int(colour[index : index + 2], 16) for index in (1, 3, 5))
        assert counts.get(channels, 0) > 200, colour


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_page_of_somebody_else_is_not_replaced(copy: Path, kind: str) -> None:
    path, outside = copy / "report.html", copy.parent / "outside.html"
    outside.write_text("<html>precious</html>")
    if kind == "file":
        path.write_text(outside.read_text())
    elif kind == "link":
        path.symlink_to(outside)
    else:
        path.mkdir()
    with pytest.raises(FileExistsError, match=f"Expected {path} to be absent or written by"):
        write_report(copy)
    assert outside.read_text() == "<html>precious</html>"


def test_an_older_report_is_replaced_and_not_what_a_link_to_one_names(copy: Path) -> None:
    path, outside = write_report(copy), copy.parent / "outside.html"
    content = path.read_bytes()
    assert write_report(copy).read_bytes() == content
    path.rename(outside)
    path.symlink_to(outside)
    written = outside.stat().st_mtime_ns
    assert not write_report(copy).is_symlink()
    assert outside.stat().st_mtime_ns == written


def test_a_task_name_may_hold_a_comma_quotes_and_mathematics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = WORKLOADS["digits"]
    names = ('left, "top"', r"right $\frac$ <b>")

    def load(config: TrainConfig) -> MultiTaskData:
        data = workload.load(config)
        tasks = (
            dataclasses.replace(task, name=n) for task, n in zip(data.tasks, names, strict=True)
        )
        return dataclasses.replace(data, tasks=tuple(tasks))

    monkeypatch.setitem(WORKLOADS, "digits", dataclasses.replace(workload, load=load))
    config = TrainConfig(
        dataset="digits", method="uniform", epochs=1, batch_size=64, lr=1e-3, num_train=100
    )
    train(config, tmp_path)
    assert read_content(tmp_path).tasks == list(names)
    page = write_report(tmp_path).read_text()
    assert "right $\\frac$ &lt;b&gt;" in page
    assert read_run(tmp_path).clean_score.shape == (1,)
