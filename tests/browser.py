"""A real browser without a window: what a page looks like to a reader, and what it complains about."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Runs once everything has been loaded, and tells the page around it what it finds.
PROBE = """<script>
window.mbibErrors = [];
window.addEventListener('error', event => window.mbibErrors.push(String(event.message || event.target)), true);
window.addEventListener('load', () => {
  const images = [...document.images].map(image => ({
    loaded: image.complete && image.naturalWidth > 0, alternative: image.alt, source: image.currentSrc.slice(0, 26),
    dark: image.currentSrc === image.parentElement.querySelector('source')?.srcset,
  }));
  parent.postMessage(JSON.stringify({
    images, errors: window.mbibErrors, scripts: document.scripts.length - 1,
    width: document.documentElement.scrollWidth, window: window.innerWidth,
    requests: performance.getEntriesByType('resource').map(entry => entry.name)
      .filter(name => !name.startsWith('data:')),
    background: getComputedStyle(document.body).backgroundColor, color: getComputedStyle(document.body).color,
    titles: [...document.querySelectorAll('h2')].map(title => title.textContent),
    dangling: [...document.querySelectorAll('nav a')].filter(a => !document.getElementById(a.hash.slice(1))).length,
  }), '*');
});
</script>"""
# A window has a least width, which is larger than a phone's; a frame in it has none.
FRAME = """<!DOCTYPE html><body style="margin: 0"><pre id="probe"></pre>
<script>addEventListener('message', event => { document.getElementById('probe').textContent = event.data; });</script>
<iframe src="probed.html" width="{width}" height="{height}" style="border: 0"></iframe>"""


def find_browser() -> str:
    """Return the path of a browser; skips the test where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")


def open_page(
    page: Path, folder: Path, width: int = 1100, height: int = 1200, dark: bool = False, picture: bool = False
) -> dict[str, Any]:
    """Open a page in a browser, with a script that reports on it.

    Args:
        page: HTML file.
        folder: for the browser's own files.
        width: of the window, in pixels.
        height: of the window, in pixels.
        dark: prefer dark pages.
        picture: leave a screenshot, ``screenshot.png``, in the folder, by starting the browser once more.

    Returns:
        What the script has found, with what the browser's console said under ``console``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probed = folder / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    framed = folder / "framed.html"
    framed.write_text(FRAME.replace("{width}", str(width)).replace("{height}", str(height)), encoding="utf-8")
    command = [
        find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars", "--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=10000",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]  # fmt: skip
    dumped = subprocess.run(
        [*command, "--dump-dom", framed.resolve().as_uri()], capture_output=True, text=True, timeout=120
    )
    if picture:
        screenshot = f"--screenshot={folder / 'screenshot.png'}"
        subprocess.run([*command, screenshot, page.resolve().as_uri()], capture_output=True, timeout=120, check=True)
    found = re.search(r'<pre id="probe">(.+?)</pre>', dumped.stdout, re.DOTALL)
    assert found is not None, dumped.stderr[-2000:]
    console = [line for line in dumped.stderr.splitlines() if ":CONSOLE" in line]
    return {**json.loads(unescape(found.group(1))), "console": console}
