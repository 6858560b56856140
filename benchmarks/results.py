"""Reads and appends rows of results.csv: measurements with their commit and machine."""

import csv
import datetime
import os
import subprocess
from pathlib import Path
from typing import Any

from lowbit.bench.machine import processor

FILE = Path(__file__).with_name("results.csv")
UNCOMMITTED = "+"  # after the commit of a row that was made from a tree with changes
COLUMNS = ("date", "commit", "machine", "benchmark", "case", "metric", "value", "unit", "notes")


def machine() -> str:
    """Describes the machine: processor, number of cores and number of threads."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{processor()}, {os.cpu_count()} cores, {threads} threads"


def commit() -> str:
    """Returns the short hash of HEAD, with "+" if files other than results have changed."""
    changed = _git("status", "--porcelain", "-uno", "--", ":/", ":!results.csv", ":!plots")
    return _git("rev-parse", "--short", "HEAD") + (UNCOMMITTED if changed else "")


def _git(*arguments: str) -> str:
    run = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()


def rows_of(benchmark: str) -> list[dict[str, str]]:
    """Returns all rows of a benchmark, oldest first."""
    with FILE.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]


def newest(benchmark: str, metric: str = "perplexity") -> dict[str, dict[str, str]]:
    """Returns the newest row of each case; one from a tree with changes if there is no other."""
    rows = [row for row in rows_of(benchmark) if row["metric"] == metric]
    rows.sort(key=lambda row: not row["commit"].endswith(UNCOMMITTED))
    return {row["case"]: row for row in rows}


def append(benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Appends rows to results.csv. rows: case, metric, value, unit and notes of each."""
    fresh = not FILE.exists()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    common = {"date": today, "commit": commit(), "machine": machine(), "benchmark": benchmark}
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({"notes": "", **common, **row})
