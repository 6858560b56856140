"""lowbit eval: one table, and the same numbers as JSON."""

import json
import math

import pytest
from zoo import MODELS

from lowbit.checkpoint.output import size_of

pytestmark = pytest.mark.slow

MODEL = MODELS / "llama-mini"


def test_one_table_and_the_same_as_json(lowbit, rtn, learned, story, tmp_path):
    file = tmp_path / "numbers.json"
    options = ("--text", story, "--seqlen", 64, "--limit", 3, "--json", file)
    lines = lowbit("eval", MODEL, rtn, learned, *options).stdout.splitlines()
    found = json.loads(file.read_text())
    assert list(found) == [str(MODEL), str(rtn), str(learned)]
    reference = found[str(MODEL)]["perplexity"][str(story)]
    assert "story.txt" in "".join(lines[:2])
    for line, (name, row) in zip(lines[2:5], found.items(), strict=True):
        value = row["perplexity"][str(story)]
        bits = row["bits_per_weight"]
        assert line.split()[:3] == [
            name.rpartition("/")[2],
            f"{bits['linears']:.2f}",
            f"{bits['model']:.2f}",
        ]
        assert f"{value:.3f}" in line
        if name != str(MODEL):
            assert line.rstrip().endswith(f"{100 * (value / reference - 1):+.1f} %")
        size = size_of(MODEL if name == str(MODEL) else rtn if name == str(rtn) else learned)
        assert bits == {"linears": size.linears, "model": size.model}
        assert row["size_bytes"] == size.bytes
        assert (row["seqlen"], row["windows"]) == (64, {str(story): 3})
    assert lines[5] == "perplexity over non-overlapping windows of 64 tokens: 3 of story.txt"
    assert list(tmp_path.iterdir()) == [file]  # nothing is left aside


def test_one_model_has_nothing_to_differ_from(lowbit, story):
    result = lowbit("eval", MODEL, MODEL, "--text", story, "--limit", 1, "--seqlen", 32)
    assert "change" not in result.stdout and result.stdout.count("llama-mini") == 1
    assert result.stderr == ""


def test_per_document_is_named(lowbit, tmp_path):
    text = tmp_path / "documents.txt"
    text.write_text("Once upon a time.\n<|endoftext|>\nThe fox ran home.\n")
    file = tmp_path / "numbers.json"
    options = ("--text", text, "--per-document", "--json", file)
    lines = lowbit("eval", MODEL, *options).stdout.splitlines()
    assert lines[-1] == (
        "perplexity per document, each from its BOS, of up to 512 tokens: 2 of documents.txt"
    )
    (row,) = json.loads(file.read_text()).values()
    assert row["per_document"] is True and math.isfinite(row["perplexity"][str(text)])


def test_reference_and_tasks(lowbit, rtn, story, tmp_path):
    (tmp_path / "piqa").mkdir()
    row = {"goal": "warm up", "sol1": "sit by the fire", "sol2": "sit on ice", "label": 0}
    (tmp_path / "piqa" / "validation.jsonl").write_text(3 * f"{json.dumps(row)}\n")
    file = tmp_path / "numbers.json"
    text = ("--text", story, "--seqlen", 64, "--limit", 2, "--reference", MODEL)
    tasks = ("--tasks-dir", tmp_path, "--tasks", "piqa", "--task-limit", 2, "--json", file)
    result = lowbit("eval", MODEL, rtn, *text, *tasks)
    whole, small = json.loads(file.read_text()).values()
    assert whole["divergence"] == {str(story): {"kl": 0.0, "agreement": 1.0, "tokens": 126}}
    assert 0 < small["divergence"][str(story)]["kl"] < 1 and small["reference"] == str(MODEL)
    assert small["tasks"]["local_piqa"]["rows"] == 2 and whole["tasks"].keys() == {"local_piqa"}
    assert "100.0 %" in result.stdout and "2 of 3" in result.stdout
    assert f"local rows of {tmp_path}" in result.stdout
    assert result.stderr == ""


def test_tasks_without_a_text(lowbit, tmp_path):
    (tmp_path / "lambada_openai").mkdir()
    row = {"context": "Once upon a", "continuation": "time"}
    (tmp_path / "lambada_openai" / "test.jsonl").write_text(json.dumps(row))
    lines = lowbit("eval", MODEL, "--text", "none", "--tasks-dir", tmp_path).stdout.splitlines()
    assert "perplexity" not in "".join(lines)
    assert "llama-mini  acc" in "\n".join(lines)


@pytest.mark.exhaustive
def test_a_row_for_each_width(lowbit, nested, rtn, story, tmp_path):
    plan, file = tmp_path / "plan.yaml", tmp_path / "numbers.json"
    plan.write_text("down_proj: 2\n")
    options = ("--text", story, "--seqlen", 64, "--limit", 1, "--json", file)
    result = lowbit("eval", nested, rtn, "--bits", f"8,4,3,{plan}", *options)
    found = json.loads(file.read_text())
    names = [f"{nested} at {width} bits" for width in (8, 4, 3)]
    assert list(found) == [*names, f"{nested} by {plan}", str(rtn)]
    assert [row["trained"] for row in found.values()] == [1, 1, 0, 1, None]
    shown = [line.split()[:4] for line in result.stdout.splitlines()[2:7]]
    learned = ("trained", "trained", "interpolated", "trained")
    for line, width, how, row in zip(
        shown, ("8", "4", "3", "plan.yaml"), learned, found.values(), strict=False
    ):
        assert line == ["nested", width, how, f"{row['bits_per_weight']['linears']:.2f}"]
    assert shown[-1][0] == "rtn" and "interpolated" not in shown[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--text", "none.txt"), "'none.txt' is not a data set with a held-out split"),
        (("--limit", "0"), "limit: should be greater than or equal to 1 (got 0)"),
        (("--bits", ""), "--bits '' is neither a width from 2 to 8 nor a file"),
        (("--seqlen", "1"), "seqlen: should be greater than or equal to 2 (got 1)"),
        (("--seqlen", "600"), "has a context of 512 tokens; --seqlen 600 is longer"),
        (("--json", "/nowhere/x.json"), "--json /nowhere/x.json: it is a folder, or is in a"),
        (("--json", "/"), "--json /: it is a folder"),
        (("--device", "gpu"), "'gpu' is not known"),
        (("--text", "none"), "there is nothing to measure: name a text or tasks"),
        (("--text", "none", "--reference", MODEL, "--tasks", "piqa"), "measured on a text"),
        (("--text", "none", "--text", "c4"), "--text none means no text"),
        (("--task-limit", "3"), "--task-limit and --few-shot need --tasks"),
        (("--tasks", ","), "--tasks ',' names no task"),
        (("--tasks-dir", "nowhere"), "nowhere holds no tasks: it must have TASK/*.jsonl"),
    ],
)
def test_mistakes(lowbit, story, options, sentence):
    text = () if "--text" in options else ("--text", story)
    result = lowbit("eval", MODEL, *text, *options, code=1)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sentence in result.stderr and result.stdout == ""
