"""Chromium without a window: what it makes of a page, and what a page asks the network for."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
PHONE = 390  # points, the width of most

# It is alone in the world: no name resolves, whoever asks.
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --hide-scrollbars "
    "--allow-file-access-from-files --virtual-time-budget=5000"
).split()
SILENT = "--host-resolver-rules=MAP * ~NOTFOUND"
BY_ITSELF = "not an origin"  # who asks, where no page does
DARK = "--blink-settings=preferredColorScheme=0"

# A page may not run scripts itself: the one around it looks inside.
FRAME = """<!doctype html><body><iframe style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, style = frame.contentWindow.getComputedStyle(page.body);
  document.body.dataset.found = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    paper: style.backgroundColor,
    ink: style.color,
    text: page.body.textContent,
    counts: Object.fromEntries({selectors}.map((s) => [s, page.querySelectorAll(s).length])),
  }});
}};
frame.src = {address};
</script>"""


@dataclass(frozen=True)
class Seen:
    """found: what the page looks like from outside. asked: addresses that the page asked for."""

    found: dict[str, Any]
    asked: list[str]


def look(page: Path, *selectors: str, width: int = PHONE, dark: bool = False) -> Seen:
    """Opens a page; `selectors` are counted."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        frame, log = folder / "frame.html", folder / "log.json"
        address = json.dumps(page.resolve().as_uri())
        frame.write_text(FRAME.format(width=width, selectors=list(selectors), address=address))
        command = [str(BROWSER), *OPTIONS, SILENT, f"--user-data-dir={folder / 'profile'}"]
        command += [f"--log-net-log={log}", *([DARK] if dark else [])]
        command += ["--dump-dom", frame.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = re.search(r'data-found="([^"]*)"', shown.stdout)
        assert found is not None, shown.stdout[:2000]
        return Seen(json.loads(unescape(found[1])), asked(log.read_text()))


def asked(log: str) -> list[str]:
    """Requests that a page began; not those of the browser itself."""
    if log.rstrip().endswith(","):  # the browser ended while it wrote
        log = log.rstrip().rstrip(",") + "]}"
    events = [event.get("params", {}) for event in json.loads(log)["events"]]
    return [e["url"] for e in events if e.get("initiator", BY_ITSELF) != BY_ITSELF]
