"""Rows of each local task, as in files and as lm-eval gets them."""

import json
from pathlib import Path

import pytest

from lowbit.eval.local_tasks import LOCAL_TASKS, find_rows, task_config

ARC = {
    "question": "Which is cold?",
    "choices": {"text": ["fire", "ice", "sun"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
ASKED = {"query": "Question: Which is cold?\nAnswer:", "choices": ["fire", "ice", "sun"], "gold": 1}
BOOLQ = {"question": "is ice cold", "answer": True, "passage": "Ice is cold."}
PIQA = {"goal": "cool a drink", "sol1": "add ice", "sol2": "add fire", "label": 0}
WINOGRANDE = {"sentence": "Ice melts, as _ is warm.", "option1": "ice", "option2": "air"}
LAMBADA = {"context": "Ice is very", "continuation": "cold"}

# task: rows of its file -> what lm-eval is given
ROWS: dict[str, list[tuple[dict[str, object], dict[str, object]]]] = {
    "arc_challenge": [(ARC, ASKED), (ASKED | {"id": "x"}, ASKED)],
    "arc_easy": [
        (ARC | {"choices": ARC["choices"] | {"label": ["1", "2", "3"]}, "answerKey": "2"}, ASKED)
    ],
    "boolq": [
        (
            BOOLQ,
            {
                "query": "Ice is cold.\nQuestion: is ice cold?\nAnswer:",
                "choices": ["no", "yes"],
                "gold": 1,
            },
        )
    ],
    "hellaswag": [(ASKED | {"ind": 7}, ASKED)],
    "lambada_openai": [(LAMBADA, {"context": "Ice is very", "continuation": " cold"})],
    "piqa": [
        (
            PIQA,
            {
                "query": "Question: cool a drink\nAnswer:",
                "choices": ["add ice", "add fire"],
                "gold": 0,
            },
        )
    ],
    "winogrande": [
        (
            WINOGRANDE | {"answer": "2"},
            {
                "choices": ["Ice melts, as ice", "Ice melts, as air"],
                "gold": 1,
                "continuation": "is warm.",
            },
        )
    ],
}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_rows(name: str, tmp_path: Path) -> None:
    given, wanted = zip(*ROWS[name], strict=True)
    write(tmp_path / name / "test.jsonl", *given)
    [found] = find_rows(tmp_path, [])
    assert found.task == name and found.scored == list(wanted)


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_what_is_asked_is_a_field_of_every_row(name: str) -> None:
    config = task_config(name)
    assert config["task"] == f"local_{name}"
    asked = {field for key, field in config.items() if key.startswith("doc_to_")}
    assert all(asked == row.keys() for _, row in ROWS[name])


@pytest.mark.parametrize(
    ("files", "scored", "examples"),
    [
        (("test_a", "test_b", "validation", "train"), ["test_a", "test_b"], ["train"]),
        (("test", "validation"), ["test"], ["validation"]),
        (("validation_1000",), ["validation_1000"], ["validation_1000"]),
        (("mine", "train"), ["mine"], ["train"]),
    ],
)
def test_splits(
    files: tuple[str, ...], scored: list[str], examples: list[str], tmp_path: Path
) -> None:
    for file in files:
        write(tmp_path / "piqa" / f"{file}.jsonl", PIQA | {"sol1": file})
    [found] = find_rows(tmp_path, ["piqa"])
    assert [row["choices"][0] for row in found.scored] == scored
    assert [row["choices"][0] for row in found.examples] == examples
    assert (found.examples is found.scored) == (scored == examples)


def test_examples_are_other_rows_than_the_one_asked(tmp_path: Path) -> None:
    write(tmp_path / "piqa" / "validation.jsonl", PIQA, PIQA)
    [found] = find_rows(tmp_path, [])
    found.check(few_shot=1)
    with pytest.raises(
        ValueError, match="--few-shot 2 needs 2 examples, but piqa has only 1: lower"
    ):
        found.check(few_shot=2)


def test_names_with_and_without_prefix(tmp_path: Path) -> None:
    for name in ("piqa", "boolq"):
        write(tmp_path / name / "test.jsonl", ROWS[name][0][0])
    write(tmp_path / "unknown" / "test.jsonl", {})
    assert [r.task for r in find_rows(tmp_path, ["local_piqa", "piqa", "boolq"])] == [
        "piqa",
        "boolq",
    ]
    assert [r.task for r in find_rows(tmp_path, [])] == ["boolq", "piqa"]
    with pytest.raises(ValueError, match="'piqqa' is not a local task: did you mean 'piqa'"):
        find_rows(tmp_path, ["piqqa"])
    with pytest.raises(ValueError, match="arc_easy has no .jsonl file; .* has boolq, piqa"):
        find_rows(tmp_path, ["arc_easy"])


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("piqa", {"goal": "x"}, "sol1 is missing"),
        (
            "piqa",
            PIQA | {"label": 2},
            "the right answer is 2, but there are only 2 choices, numbered from 0",
        ),
        ("piqa", PIQA | {"sol1": ""}, "the question or a choice is '', which is no text"),
        ("piqa", ["x"], "a value is of the wrong kind: "),
        ("arc_easy", ARC | {"answerKey": "D"}, "answerKey is 'D', allowed are 'A', "),
        ("boolq", BOOLQ | {"answer": "maybe"}, "answer is 'maybe', allowed are False, True"),
        ("winogrande", WINOGRANDE | {"answer": "3"}, "answer is '3', allowed are '1', '2'"),
        ("hellaswag", {"query": "x", "choices": [], "gold": 0}, "there are no choices"),
        ("lambada_openai", {"context": "", "continuation": "x"}, "context is empty"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(
    name: str, row: object, reason: str, tmp_path: Path
) -> None:
    file = write(tmp_path / name / "test.jsonl", ROWS[name][0][0], row)
    message = f"{file}, line 2 is not a row of {name}: it must be an object with .*, but {reason}"
    with pytest.raises(ValueError, match=message):
        find_rows(tmp_path, [])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("piqa/test.jsonl", "\n", "piqa has no rows in"),
        ("piqa/test.jsonl", "{", "line 1 cannot be read as JSON"),
        ("piqa/train.jsonl", "{}", "only training rows"),
        ("other/test.jsonl", "{}", "holds no tasks: it must have TASK/.*arc_challenge, arc_easy"),
    ],
)
def test_folders_without_rows(file: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_rows(tmp_path, [])
