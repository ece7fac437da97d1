"""The site on a phone and on a desk: no column of single letters at 390 pixels, no code cut off at 1,400."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from _site import build_site

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

# Measures every page in a frame of the given width. A part that holds text and no other part counts as narrow when
# its lines hold fewer than five characters on average though it has twenty or more.
MEASURE = """
const leaves = "article :is(td, th, p, li, dd):not(:has(p, ul, ol, dl, dd, table, div))";
const narrow = (page) => [...page.querySelectorAll(leaves)].filter((part) => {
  const text = part.innerText.trim();
  const line = parseFloat(page.defaultView.getComputedStyle(part).lineHeight) || 20;
  return text.length >= 20 && part.clientHeight > 0 && text.length / (part.clientHeight / line) < 5;
}).map((part) => part.innerText.slice(0, 60));
const cut = (page) => [...page.querySelectorAll("article pre")].filter(
  (pre) => pre.clientWidth > 0 && pre.scrollWidth > pre.clientWidth + 1
).map((pre) => pre.innerText.split("\\n").reduce((a, b) => a.length > b.length ? a : b));
const measure = async () => {
  const found = {};
  for (const name of PAGES) {
    const frame = document.createElement("iframe");
    frame.style = `width: ${WIDTH}px; height: 900px; border: none`;
    document.body.append(frame);
    await new Promise((done) => { frame.onload = done; frame.src = name; });
    const page = frame.contentDocument;
    found[name] = {
      width: page.defaultView.innerWidth,
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      parts: page.querySelectorAll("article :is(td, th, p, li, dd)").length,
      code: page.querySelectorAll("article pre").length,
      narrow: narrow(page),
      cut: cut(page),
    };
    frame.remove();
  }
  document.title = "measured";
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
};
measure();
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("layout"))


def measured(site: Path, width: int, profile: Path) -> dict[str, Any]:
    """What the browser finds on each page in a window of that many pixels."""
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    script = f"const WIDTH = {width}, PAGES = {json.dumps(pages)};{MEASURE}"
    harness = site / f"measure_{width}.html"
    harness.write_text(f"<body><script>{script}</script></body>", encoding="utf-8")
    try:
        printed = subprocess.run(
            [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             "--allow-file-access-from-files", "--virtual-time-budget=600000",
             f"--user-data-dir={profile}", f"--window-size={width + 100},1000", harness.as_uri()],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    finally:
        harness.unlink()
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', printed, flags=re.DOTALL)
    return json.loads(html.unescape(found))


def test_no_column_of_single_letters_and_no_page_to_scroll_sideways_on_a_phone(site, tmp_path):
    pages = measured(site, 390, tmp_path)
    assert len(pages) > 25
    assert sum(page["parts"] for page in pages.values()) > 2000
    assert {page["width"] for page in pages.values()} == {390}
    assert not {name: page["narrow"] for name, page in pages.items() if page["narrow"]}
    assert not {name: page["overflow"] for name, page in pages.items() if page["overflow"] > 0}


def test_no_code_is_cut_off_on_a_desk(site, tmp_path):
    pages = measured(site, 1400, tmp_path)
    assert sum(page["code"] for page in pages.values()) > 50
    assert not {name: page["cut"] for name, page in pages.items() if page["cut"]}


def test_the_measurement_finds_a_column_of_letters_and_code_that_is_cut_off(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<article><table><tr><td style='max-width: 1em; overflow-wrap: anywhere'>"
        "a sentence of some words</td></tr></table>"
        f"<pre style='width: 200px; overflow: auto'>{'code ' * 40}</pre></article>"
    )
    (page,) = measured(tmp_path, 390, tmp_path / "profile").values()
    assert page["narrow"] == ["a sentence of some words"]
    assert len(page["cut"]) == 1
