"""Files are compared with what is stated of them; names and facts are not trusted."""

from pathlib import Path
from typing import Any

import pytest

from lowbit.checkpoint.hashes import (
    facts_of,
    facts_of_files,
    is_inside,
    loading_problem,
    problem_of,
    problems,
)

FACTS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "has no valid size"),
    "a list": ([1, 2], "has no valid size"),
    "no size": ({"sha256": "x"}, "has no valid size"),
    "a size that is true": ({"size": True}, "has no valid size"),
    "another size": ({"size": 1234}, "has 3 bytes, not 1,234"),
    "no hash": ({"size": 3}, "is damaged"),
    "another hash": ({"size": 3, "sha256": "x"}, "is damaged"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for name in ("outside", "folder/a.json", "folder/inside/b"):
        (tmp_path / name).write_text("one")
    return tmp_path / "folder"


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str, folder: Path) -> None:
    facts, problem = FACTS[name]
    assert str(problem_of(folder, "a.json", facts)).startswith(problem)


def test_as_it_was_written(folder: Path) -> None:
    found = facts_of_files(folder, [Path("inside/b"), "a.json"])
    assert list(found) == ["a.json", "inside/b"]
    assert not any(problem_of(folder, name, facts) for name, facts in found.items())
    assert problem_of(folder, "a.json", {"size": 3}, hashes=False) is None


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "", ".", "inside/../../outside", "inside", "none", "a\0b"]
)
def test_names_that_are_no_file_of_the_folder(name: str, folder: Path) -> None:
    facts = facts_of(folder.parent / "outside")
    assert problem_of(folder, name, facts) == "is missing"


def test_is_inside() -> None:
    assert is_inside("a/b.json") and is_inside("..a")
    assert not is_inside("a/../b") and not is_inside("..")


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lowbit.checkpoint.hashes.file_sha256", refuse)
    assert problem_of(folder, "a.json", {"size": 3}) == "cannot be read: Permission denied"


LOADING: dict[str, tuple[str, bool, bool]] = {  # a missing file, partial, whether it is refused
    "tokenizer": ("tokenizer.json", False, True),
    "tokenizer, downloaded in part": ("tokenizer.json", True, False),
    "licence": ("LICENSE.txt", False, False),
    "words": ("merges.txt", False, True),
    "report": ("report.json", False, False),
    "learned": ("learned/model-00001-of-00003.safetensors", False, False),
}


@pytest.mark.parametrize("name", LOADING)
def test_which_files_loading_needs(name: str, folder: Path) -> None:
    file, partial, refused = LOADING[name]
    section = {"other_files": {"a.json": facts_of(folder / "a.json"), file: {"size": 1}}}
    assert loading_problem(folder, section, partial) == ((file, "is missing") if refused else None)
    (folder / "a.json").write_text("two")
    assert loading_problem(folder, section, True) == ("a.json", "is damaged: its sha256 differs")


def test_folders_of_earlier_versions(folder: Path) -> None:
    assert loading_problem(folder, {}, False) is None
    assert loading_problem(folder, {"other_files": [1]}, False) is None


TOKENIZER = "tokenizer.json"
# Files that are stated, files that are there too, and those of them that loading would read.
ADDITIONS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "a template": ([TOKENIZER], ["chat_template.jinja"], ["chat_template.jinja"]),
    "one of several": (
        [TOKENIZER],
        ["additional_chat_templates/a.jinja"],
        ["additional_chat_templates/a.jinja"],
    ),
    "tokens": ([TOKENIZER], ["added_tokens.json", "x.model"], ["added_tokens.json", "x.model"]),
    "ends": ([TOKENIZER], ["generation_config.json"], ["generation_config.json"]),
    "notes": ([TOKENIZER], ["notes.txt", "log.json", "README.md"], []),
    "kept": ([TOKENIZER], ["tokenizer.json.changed"], []),
    "a tokenizer where there was none": (["a.json"], [TOKENIZER, "chat_template.jinja"], []),
    "an earlier version": ([], [TOKENIZER, "generation_config.json"], []),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_files_that_were_added(name: str, folder: Path) -> None:
    stated, there, added = ADDITIONS[name]
    for file in stated + there:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("one")
    section = {"other_files": facts_of_files(folder, stated)}
    assert [found for found, problem in problems(folder, section) if problem] == added
    found = loading_problem(folder, section, partial=False)
    assert found == ((added[0], "was added after quantization") if added else None)
