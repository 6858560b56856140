"""Checks each file of a quantized folder against its hash, for lowbit verify."""

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.hashes import problems
from lowbit.checkpoint.recognize import quantized_folder
from lowbit.checkpoint.verify import config_digest, quantization_section
from lowbit.cli.screen import console, size
from lowbit.exporters.compare import file_problems


def check_files(folder: Path, screen: Console) -> None:
    """Prints each file with "ok" or with its problem; exits with status 1 if there is a problem."""
    config = quantized_folder(folder).config
    section = quantization_section(config, folder)
    stated = section.get("files")
    if not isinstance(stated, dict) or not stated:
        came = "missing" if "files" not in section else "empty" if not stated else "not an object"
        raise ValueError(
            f"{folder}/config.json: quantization_config.files is {came}; it must give size and "
            "sha256 of each shard. Copy config.json from its source again"
        )
    wrong = 0 if _passes(screen, "config.json", _config_problem(config, section)) else 1
    for name, problem in problems(folder, section):
        wrong += not _passes(screen, name, problem)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in stated:
            wrong += not _passes(screen, path.name, "is not listed in config.json")
    if wrong:
        text = (
            f"files that differ from what lowbit wrote: {wrong}; copy them from their source again"
        )
        console(stderr=True).print(text, style="red", soft_wrap=True)
        raise typer.Exit(1)
    quantized = QuantizedFolder(folder)
    quantized.verify(hashes=False)  # checks that files and config.json agree with each other
    total = size(sum((folder / name).stat().st_size for name in stated))
    linears = f"{len(quantized.entries):,} quantized linears"
    screen.print(
        f"{folder} is complete: {linears}, {total} of weights", style="bold", soft_wrap=True
    )


def check_exported(folder: Path, screen: Console) -> None:
    """Does the same for a folder that lowbit export wrote."""
    found = file_problems(folder)
    wrong = sum(not _passes(screen, name, problem) for name, problem in found.items())
    if wrong:
        text = f"files that differ from what lowbit wrote: {wrong}; export them again"
        console(stderr=True).print(text, style="red", soft_wrap=True)
        raise typer.Exit(1)
    screen.print(f"{folder} is as it was exported", style="bold", soft_wrap=True)


def _passes(screen: Console, name: str, problem: str | None) -> bool:
    """Prints the outcome for one file, and returns whether it is ok."""
    outcome = (problem, "red") if problem else ("ok", "green")
    screen.print(Text.assemble(name, "  ", outcome), soft_wrap=True)
    return problem is None


def _config_problem(config: dict[str, Any], section: dict[str, Any]) -> str | None:
    stated = section.get("digest")
    if stated is None:
        return "has no digest: it cannot be checked whether it was edited"
    return None if stated == config_digest(config) else "was edited after quantization"
