"""The model card: what it says, what it takes over, and that nobody's own card is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantized
import yaml
from huggingface_hub import ModelCard

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.card import FRONT, measured_part, read_metadata, write_measured
from lowbit.checkpoint.card_facts import base_model, write_card
from lowbit.checkpoint.integrity import folder_problems
from lowbit.checkpoint.output import size_of

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized.source(), tmp_path / "model"))


def front(folder: Path) -> dict[str, Any]:
    found = FRONT.match((folder / "README.md").read_text())
    assert found
    return yaml.safe_load(found[1])


def test_the_card_of_a_run(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text(
        "---\nlicense: llama3.2\nlanguage: [en, de]\nbase_model: a/b\ntags: [x]\n---\n# Theirs\n"
    )
    out = quantized.quantize(model, tmp_path / "out", "gptq", recipe="mine")
    assert front(out) == {
        "license": "llama3.2",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lowbit", "gptq"],
        "quantized_by": None,
    }
    text = (out / "README.md").read_text()
    size = size_of(out)
    assert f"{size.linears:.2f} in the quantized linears" in text
    assert f"{size.model:.2f} in the whole model" in text
    assert "| recipe | `mine` |" in text and "gptq(bits=3, group_size=16" in text
    assert "2 windows of 16 tokens: text-0.txt" in text and str(tmp_path) not in text
    assert "`vllm serve MODEL`" in text and "`lowbit serve MODEL`" in text
    assert "llama3.2, as the base model's card says" in text and "Theirs" not in text
    ModelCard(text).data.to_dict()


CARDS = {
    "none": None,
    "no metadata": "# A model",
    "no YAML": "---\nlicense: [\n---\n",
    "no mapping": "---\n- license\n---\n",
    "no text": "---\nlicense: {a: b}\nlanguage: [1]\n---\n",
    "an object of Python": "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
    "no UTF-8": b"---\nlicense: \xff\n---\n",
    "too long": "---\nlicense: mit\n---\n" + "x" * 2_000_000,
}


@pytest.mark.parametrize("theirs", CARDS.values(), ids=CARDS)
def test_a_base_model_without_a_licence(theirs: Any, tmp_path: Path) -> None:
    out = Path(shutil.copytree(quantized.folder(), tmp_path / "out"))
    (out / "README.md").unlink()
    source = tmp_path / "source"
    source.mkdir()
    if theirs is not None:
        (source / "README.md").write_bytes(theirs if isinstance(theirs, bytes) else theirs.encode())
    write_card(out, QuantizedFolder(out).config, source)
    assert "license" not in front(out) and "language" not in front(out)
    assert "not stated by the folder of the base model" in (out / "README.md").read_text()


@pytest.mark.parametrize("content", ["# Mine", None], ids=["changed", "removed"])
def test_a_card_is_the_users(content: str | None, model: Path, tmp_path: Path) -> None:
    out = quantized.quantize(model, tmp_path / "out")
    card = out / "README.md"
    card.unlink() if content is None else card.write_text(content)
    assert folder_problems(out) == {}
    lowbit.verify(out)
    lowbit.load(out)
    assert quantized.quantize(model, out) == out
    assert (card.read_text() if card.exists() else None) == content


def test_a_card_that_is_there_before_the_run_ends_is_kept(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def on_event(event: Any) -> None:
        (out / "README.md").write_text("# Mine")

    quantized.quantize(model, out, on_event=on_event)
    assert (out / "README.md").read_text() == "# Mine"


def test_what_is_made_of_a_quantized_folder(tmp_path: Path) -> None:
    master = Path(shutil.copytree(quantized.master(), tmp_path / "master"))
    card = master / "README.md"
    stated = "---\nbase_model: someone/llama\nlicense: mit\n"
    card.write_text(card.read_text().replace("---\n", stated, 1))
    write_measured(master, "| perplexity 7 |")
    slice4 = lowbit.slice(master, tmp_path / "slice", 4)
    dense = lowbit.dequantize(master, tmp_path / "dense")
    for made in (slice4, dense):
        assert front(made)["base_model"] == "someone/llama" and front(made)["license"] == "mit"
        assert front(made)["base_model_relation"] == "quantized"
        assert "| base model | someone/llama |" in (made / "README.md").read_text()
    assert "cut from `master`" in (slice4 / "README.md").read_text()
    assert "perplexity 7" not in (slice4 / "README.md").read_text()  # it is that of the master
    assert "perplexity 7" in (dense / "README.md").read_text()


def test_the_name_of_a_model_from_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "models--meta-llama--Llama-3.2-1B"
    snapshot = repository / "snapshots" / "0123abc"
    shutil.copytree(quantized.source(), snapshot)
    (repository / "blobs").mkdir()
    assert base_model(snapshot) == "meta-llama/Llama-3.2-1B"
    out = quantized.quantize(snapshot, tmp_path / "out")
    assert front(out)["base_model"] == "meta-llama/Llama-3.2-1B"
    assert "# meta-llama/Llama-3.2-1B, quantized" in (out / "README.md").read_text()
    assert "0123abc" not in (out / "README.md").read_text()


PLACES = {
    "a card of lowbit": (
        "# A\n<!-- lowbit eval -->\nold\n<!-- end of lowbit eval -->\nb\n",
        "# A\n<!-- lowbit eval -->\nnew\n<!-- end of lowbit eval -->\nb\n",
    ),
    "an empty place": (
        "<!-- lowbit eval --><!-- end of lowbit eval -->",
        "<!-- lowbit eval -->\nnew\n<!-- end of lowbit eval -->",
    ),
    "another card": (
        "# A\n",
        "# A\n\n## Measured\n\n<!-- lowbit eval -->\nnew\n<!-- end of lowbit eval -->\n",
    ),
    "half a place": (
        "<!-- lowbit eval -->\nA",
        "<!-- lowbit eval -->\nA\n\n## Measured\n\n"
        "<!-- lowbit eval -->\nnew\n<!-- end of lowbit eval -->\n",
    ),
}


@pytest.mark.parametrize(("before", "after"), PLACES.values(), ids=PLACES)
def test_measurements_are_written_into_their_place(before: str, after: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(before)
    write_measured(tmp_path, "new")
    assert (tmp_path / "README.md").read_text() == after
    assert "new" in (measured_part(tmp_path) or "")


def test_a_card_that_is_no_text_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        write_measured(tmp_path, "new")
    assert (tmp_path / "README.md").read_bytes() == b"\xff" and read_metadata(tmp_path) == {}


def test_the_card_of_an_earlier_run_is_replaced_unless_it_was_changed(
    model: Path, tmp_path: Path
) -> None:
    """As when the config.json of another run was put into OUT."""
    out = quantized.quantize(model, tmp_path / "out")
    own = (out / "README.md").read_text()
    config = QuantizedFolder(out).config
    for theirs, replaced in ((own, True), (own.replace("rtn", "gptq"), False), ("# A\n", False)):
        (out / "README.md").write_text(theirs)
        section = config["quantization_config"]
        other = section | {"made_by": section["made_by"] | {"recipe": "another"}}
        write_card(out, config | {"quantization_config": other}, model)
        assert ("`another`" in (out / "README.md").read_text()) == replaced


BASES = {
    "another program's, whose card names it": ("gptq", "base_model: a/b", "a/b"),
    "in a list": ("gptq", "base_model: [a/b]", "a/b"),
    "of two models": ("gptq", "base_model: [a/b, c/d]", None),
    "not stated": ("gptq", "license: mit", None),
    "no id": ("gptq", "base_model: llama", None),
    "a float model's own base": (None, "base_model: a/b", None),  # it is not the model itself
}


@pytest.mark.parametrize(("method", "metadata", "expected"), BASES.values(), ids=BASES)
def test_the_base_of_a_folder(
    method: str | None, metadata: str, expected: str | None, tmp_path: Path
) -> None:
    section = {} if method is None else {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | section))
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    assert base_model(tmp_path) == expected
