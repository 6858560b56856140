"""Opens pages in headless Chromium, and records what they request from the network."""

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
PHONE = 390  # points, the width of most phones

# No host name resolves, so the browser cannot reach the network.
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --hide-scrollbars "
    "--allow-file-access-from-files --virtual-time-budget=5000"
).split()
SILENT = "--host-resolver-rules=MAP * ~NOTFOUND"
OWN_INITIATOR = "not an origin"  # initiator of the browser's own requests
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
    """What a page did.

    found: measurements of the page, such as the count of each selector.
    asked: addresses that the page requested.
    """

    found: dict[str, Any]
    asked: list[str]


def look(page: Path, *selectors: str, width: int = PHONE, dark: bool = False) -> Seen:
    """Opens a page, and counts the elements of each selector."""
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
    """Returns the requests of the page, without those of the browser itself."""
    if log.rstrip().endswith(","):  # the browser ended before the log was complete
        log = log.rstrip().rstrip(",") + "]}"
    events = [event.get("params", {}) for event in json.loads(log)["events"]]
    return [e["url"] for e in events if e.get("initiator", OWN_INITIATOR) != OWN_INITIATOR]
