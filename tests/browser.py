"""A page opened in headless Chromium, without a network: what a script finds there, and what went wrong on the way."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--dump-dom",
]  # fmt: skip
BEFORE = """<script>
window.lorabenchErrors = [];
addEventListener("error", (event) => lorabenchErrors.push(event.message || `cannot load ${event.target.src}`), true);
addEventListener("unhandledrejection", (event) => lorabenchErrors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => lorabenchErrors.push(`asks for ${event.blockedURI}`));
for (const name of ["error", "warn"]) console[name] = (...words) => lorabenchErrors.push(words.join(" "));
</script>"""
AFTER = """<script>
addEventListener("load", async () => {
  const $ = (selector) => document.querySelector(selector), $$ = (selector) => [...document.querySelectorAll(selector)];
  const out = { milliseconds: performance.now() };
  try {
    out.found = await (async () => { %s })();
  } catch (error) {
    lorabenchErrors.push(String(error.stack));
  }
  out.overflow = document.documentElement.scrollWidth - innerWidth;
  const entries = performance.getEntriesByType("resource").map((entry) => entry.name);
  out.requests = entries.filter((name) => !name.startsWith("data:"));
  out.errors = lorabenchErrors;
  const told = { id: "outcome", textContent: JSON.stringify(out) };
  document.body.replaceChildren(Object.assign(document.createElement("pre"), told));
});
</script>"""


def chromium() -> str:
    """The program; where there is none the test is skipped, but never where LORABENCH_TEST_BROWSER asks for it."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and not os.environ.get("LORABENCH_TEST_BROWSER"):
        pytest.skip("there is no chromium")
    assert found, "LORABENCH_TEST_BROWSER is set, and there is no chromium"
    return found


def visit(page: Path, script: str, width: int = 1400, height: int = 1000, *flags: str, wait: bool = True) -> Any:
    """What the body of an async function returns on the page; AssertionError where anything went wrong.

    `{found, milliseconds, overflow, ...}`: the milliseconds until the page was loaded, and by how many pixels it is
    wider than the window when the script has ended. Without `wait` the clock is the machine's own.
    """
    program, text = chromium(), page.read_text("utf-8")
    text = text.replace("<meta name=", f"{BEFORE}\n<meta name=", 1).replace("</body>", f"{AFTER % script}\n</body>")
    budget = ["--virtual-time-budget=8000"] if wait else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(text, "utf-8")
        command = [
            program,
            *FLAGS,
            *budget,
            *flags,
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
        ]
        done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120)
    outcome = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert outcome, done.stderr[-2000:]
    found = json.loads(html.unescape(outcome[1]))
    assert found["errors"] == [] and found["requests"] == []
    return found
