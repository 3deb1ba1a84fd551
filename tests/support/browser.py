"""Pages in headless Chromium; tests that need it are skipped by name where there is none."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

MEASURE = """
const inner = document.querySelector("iframe"), page = inner.contentDocument, view = inner.contentWindow;
const all = [...page.body.querySelectorAll("*")].filter(one => one.getClientRects().length && !one.closest("svg"));
const told = one => one.tagName + "." + one.className + " " + one.textContent.trim().slice(0, 30);
const right = one => one.getBoundingClientRect().right;
const within = [...page.querySelectorAll(".cards")].map(one => view.getComputedStyle(one).gridTemplateColumns);
document.title = JSON.stringify({
  wide: page.documentElement.scrollWidth,
  over: all.filter(one => !one.closest(".scroll table") && right(one) > inner.clientWidth + 1).map(told),
  smallest: Math.min(...all.filter(one => [...one.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
    .map(one => parseFloat(view.getComputedStyle(one).fontSize))),
  figures: [...page.querySelectorAll("figure .plot")].map(one => one.getBoundingClientRect().width),
  columns: within.length ? within[0].split(" ").length : 0,
});
"""


def chromium() -> list[str]:
    """The command of a headless Chromium, without a page; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no Chromium on this machine ({', '.join(names)})")
    return [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]


def laid_out(page: str, folder, width: int) -> dict:
    """How a page comes out at a width in pixels, in a frame of it, as windows cannot be narrower than 500.

    wide: pixels that it scrolls over; over: elements that reach beyond the right edge, but for those of tables that
    scroll; smallest: text, in pixels; figures: their widths; columns: of the cards.
    """
    (folder / "page.html").write_text(page)
    frame = f'<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>'
    script = f"onload = () => {{ {MEASURE} }}"
    outer = folder / "frame.html"
    outer.write_text(f"<!doctype html><title></title><script>{script}</script><body style='margin:0'>{frame}")
    command = [*chromium(), "--allow-file-access-from-files", "--window-size=1400,1000", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, flags=re.S)[1]))
