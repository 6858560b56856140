"""Folders that a stopped run leaves for the next one, which trusts them only if nothing changed."""

from pathlib import Path

from lowbit.checkpoint.hashes import facts_of_files, problem_of
from lowbit.checkpoint.reader import read_json
from lowbit.checkpoint.writer import write_json

HASHES = "hashes.json"


def keep(folder: Path) -> None:
    """Writes size and hash of every file in a folder into the folder, once all are written."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    write_json(folder / HASHES, facts_of_files(folder, [n for n in names if n.name != HASHES]))


def is_kept(folder: Path) -> bool:
    """Returns whether every file in a folder is as it was when `keep` was called."""
    try:
        facts = read_json(folder / HASHES)
    except ValueError:
        return False
    whole = isinstance(facts, dict) and bool(facts)
    return whole and not any(problem_of(folder, name, fact) for name, fact in facts.items())


def last_kept(folder: Path) -> Path | None:
    """Returns the newest folder inside that is as it was when `keep` was called; None: none is.

    folder: holds one folder for each state of a training, NAME-STEP; the last one may be partial.
    """
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("*-*[0-9]")}
    newest_first = (steps[step] for step in sorted(steps, reverse=True))
    return next((state for state in newest_first if is_kept(state)), None)
