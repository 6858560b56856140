"""auto_quip: AutoQuIP's command with its seven flags."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from lowbit.auto_quip import QuipQuantizer
from lowbit.cli import MISTAKES, tell
from lowbit.cli.progress import RunProgress
from lowbit.cli.screen import console
from lowbit.models.quiet import quiet


def auto_quip(
    model_name: Annotated[str, Option("--model_name", help="A folder or a hub id.")],
    quant_dir: Annotated[Path, Option("--quant_dir", help="The folder to write.")],
    codebook: Annotated[
        str, Option("--codebook", help="E8P12, E8P12RVQ3B, E8P12RVQ4B, D4 or HI.")
    ] = "E8P12",
    dataset: Annotated[str, Option("--dataset", help="Calibration text.")] = "wikitext2",
    nsamples: Annotated[int, Option("--nsamples", min=1, max=65536)] = 4096,
    quip_tune_iters: Annotated[int, Option("--quip_tune_iters", min=0, max=1024)] = 10,
    modules_to_not_convert: Annotated[
        str, Option("--modules_to_not_convert", help="Parts of names, with commas between them.")
    ] = "",
    merge_suv: Annotated[bool, Option("--merge_suv", help="Signs go into norms.")] = False,
) -> None:
    """Quantize a model with QuIP#; `lowbit quantize --recipe quip-e8p-2bit` can do more."""
    quantizer = QuipQuantizer(
        codebook=codebook,
        dataset=dataset,
        nsamples=nsamples,
        quip_tune_iters=quip_tune_iters,
        modules_to_not_convert=modules_to_not_convert,
        merge_suv=merge_suv,
    )
    screen = console()
    with RunProgress(screen) as progress:
        quantizer.quantize_folder(model_name, quant_dir, progress)
    screen.print(f"{quant_dir}: lowbit inspect {quant_dir}", soft_wrap=True)


def main() -> None:
    """The console script `auto_quip`."""
    quiet(downloads=not sys.stderr.isatty())
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(auto_quip)
    try:
        app(prog_name="auto_quip")
    except MISTAKES as error:
        tell(error)
        sys.exit(1)
