"""The page as text and in a browser: it is complete, loads nothing, and escapes all names."""

import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import quantized
from browser import BROWSER, PHONE, look

from lowbit.report import read_results, read_run, render
from lowbit.report.page import MOST_NAMES, fallback_groups, setting

pytestmark = pytest.mark.slow

needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser")

EVIL = "</style><script>document.title='evil'</script><img src=http://evil.invalid/x onerror=a>"
FETCHING = {"src", "href", "srcset", "action", "data", "poster", "background", "ping", "xlink:href"}
TAGS = set(
    "html head meta title style body header main footer section figure figcaption details summary "
    "h1 h2 h3 p b i small code span div dl dt dd ul li table thead tbody tr th td "
    "svg rect line polyline".split()
)


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        assert self.open == [], "not closed"

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path, results: Any = None) -> str:
    rows = []
    if results is not None:
        path = folder.parent / "results.json"
        path.write_text(json.dumps(results))
        rows = read_results(path)
    return render(read_run(folder), rows)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with markup in each text that may come from an untrusted file."""
    out = tmp_path_factory.mktemp("hostile") / "out"
    folder = Path(shutil.copytree(quantized.folder("llama", "omniquant"), out))

    def forge_config(config: Any) -> None:
        made_by = config["quantization_config"]["made_by"]
        made_by |= {"source": EVIL, "recipe": EVIL, "device": EVIL, "more": {EVIL: [EVIL]}}
        made_by["method"] |= {EVIL: EVIL}
        made_by["versions"][EVIL] = EVIL
        made_by["calibration"]["sources"][0]["name"] = EVIL

    def forge_report(report: Any) -> None:
        report["fallbacks"] |= {EVIL: EVIL, "model.layers.0": EVIL}
        report["fallbacks"]["model.layers.0.mlp.up_proj"] = EVIL
        report["left_float"].append(EVIL)
        report["blocks"][f"h.{EVIL}.7"] = {"linears": {EVIL: {"signal_to_noise_db": 3.0}}}

    quantized.edit_json(folder / "config.json", forge_config)
    quantized.edit_json(folder / "report.json", forge_report)
    quantized.seal(folder)
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "warning", "time": 1e9, "text": EVIL}) + "\n")
    return folder


def test_every_linear_and_where_it_came_from() -> None:
    folder = quantized.folder("llama", "omniquant")
    read = Reader(page_of(folder))
    assert read.attributes.count(("class", "scroll")) == 4  # two blocks, formats, files
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        assert read.text.count(name) == 1 + 2  # in the grid and in each block
    made_by = quantized.section(folder)["made_by"]
    known = [made_by["source"], made_by["model"], made_by["calibration"]["digest"]]
    known += [made_by["calibration"]["sources"][0]["name"], quantized.section(folder)["digest"]]
    known += [facts["sha256"] for facts in quantized.section(folder)["files"].values()]
    known += made_by["method"]
    assert [text for text in known if text not in read.text] == []


def test_the_same_page_twice() -> None:
    folder = quantized.folder("llama", "omniquant")
    assert page_of(folder) == page_of(folder)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_methods_that_learn_nothing(name: str) -> None:
    read = Reader(page_of(quantized.folder(name)))
    assert "polyline" not in read.tags and "vs. rtn" not in read.text
    assert "time" in read.text and "peak memory" in read.text


def test_nothing_can_be_fetched_or_run(hostile: Path) -> None:
    page = page_of(
        hostile, {EVIL: {"model": EVIL, "method": EVIL, "perplexity": {EVIL: 3.0}, EVIL: 1}}
    )
    read = Reader(page)
    assert set(read.tags) <= TAGS
    names = {name for name, _ in read.attributes}
    assert not names & FETCHING and not [name for name in names if name.startswith("on")]
    styles = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    styles += [value for name, value in read.attributes if name == "style"]
    assert len(styles) > 10 and not re.search(r"url\(|@import|https?:", " ".join(styles))
    policy = next(value for _, value in read.attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert read.text.count(EVIL) > 15  # it is all there, as text


def test_fallbacks_are_grouped_by_reason() -> None:
    run = read_run(quantized.folder())
    sentences = {f"h.{i}.up": f"it saw only {i} tokens" for i in (7, 3, 5)} | {"h.1": "no better"}
    run.report.fallbacks.update(sentences)
    run.report.left_float.append("h.1.gate")
    try:
        found = {group.reason: group.names for group in fallback_groups(run)}
    finally:
        run.report.fallbacks.clear()
        run.report.left_float.clear()
    assert found == {
        "it saw only 3 to 7 tokens": [("h.7.up", "7"), ("h.3.up", "3"), ("h.5.up", "5")],
        "no better": [("h.1", "")],
        "left in float": [("h.1.gate", "")],
    }


def test_long_lists_end(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized.folder(), tmp_path / "out"))
    many = {f"h.{i}": "no better" for i in range(MOST_NAMES + 50)}
    quantized.edit_json(folder / "report.json", lambda report: report["fallbacks"].update(many))
    quantized.seal(folder)
    read = Reader(page_of(folder))
    assert read.tags.count("li") == MOST_NAMES and "and 50 more, in report.json" in read.text


EARLIER = Path(__file__).parent / "earlier"


@pytest.mark.parametrize("name", [path.name for path in sorted(EARLIER.iterdir())])
def test_reports_of_an_earlier_version(name: str, tmp_path: Path) -> None:
    model = {"falcon": "falcon 40b"}.get(name.split("-")[1], name.split("-")[1])
    folder = Path(shutil.copytree(quantized.folder(model), tmp_path / "out"))
    for file in ("report.json", "events.jsonl"):
        shutil.copyfile(EARLIER / name / file, folder / file)
    quantized.seal(folder)
    read = Reader(page_of(folder))
    report = json.loads((folder / "report.json").read_text())
    for facts in report["blocks"].values():
        errors = {name: known["signal_to_noise_db"] for name, known in facts["linears"].items()}
        alone = [error for name, error in errors.items() if ".experts." not in name]
        assert all(f"{error:.1f} dB" in read.text for error in alone)
        assert f"{min(errors.values()):.1f}" in read.text
    assert all(linear in read.text for linear in report["given_up"])
    assert "peak memory" in read.text
    if "loss_rtn" in facts:
        assert "loss vs. rtn" in read.text
    if name == "omniquant-falcon":
        assert read.text.count("rounding to nearest was better") == 1
        assert "transformer.h.1: rounding" not in read.text  # the block's name is not repeated


SETTINGS = {
    "none": None,
    "yes": True,
    "0.005": 0.005,
    "a, 2": ["a", 2],
    "down_proj: bits: 4": {"down_proj": {"bits": 4}},
}


@pytest.mark.parametrize("text", SETTINGS)
def test_settings(text: str) -> None:
    assert setting(SETTINGS[text]) == text


# Each look takes two or three seconds, most of which the browser needs to start.


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(dark: bool, tmp_path: Path) -> None:
    folder, path = quantized.folder("llama", "omniquant"), tmp_path / "report.html"
    results = {"a": {"model": str(folder), "perplexity": {"a long name of a text.txt": 3}}}
    path.write_text(page_of(folder, results))
    seen = look(path, ".cells i", "details .inside", "svg polyline", ".bars rect", dark=dark)
    assert seen.asked == []
    assert seen.found["width"] == PHONE  # nothing sticks out
    counts = seen.found["counts"]
    assert (counts[".cells i"], counts["details .inside"]) == (2 * 7, 2)
    assert counts[".bars rect"] >= 2 * 2  # time and memory of two blocks, and what was saved
    paper, ink = brightness(seen.found["paper"]), brightness(seen.found["ink"])
    assert paper < 40 < 200 < ink if dark else ink < 60 < 230 < paper


@needs_browser
def test_a_hostile_folder_in_a_browser(hostile: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page_of(hostile))
    seen = look(path, "script", "img", "head title")
    assert seen.asked == [] and seen.found["counts"] == {"script": 0, "img": 0, "head title": 1}
    assert EVIL in seen.found["text"] and seen.found["width"] == PHONE
    unsafe = path.read_text().replace("&lt;", "<").replace("&gt;", ">")
    path.write_text(re.sub("<meta http-equiv[^>]*>", "", unsafe))
    assert any("evil.invalid" in url for url in look(path).asked)  # this test can see a request


def brightness(color: str) -> float:
    """Brightness from 0 to 255 of a color rgb(r, g, b)."""
    parts = [int(number) for number in re.findall(r"\d+", color)[:3]]
    return sum(parts) / 3
