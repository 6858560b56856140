"""The command `auto_quip`, with the seven flags of AutoQuIP."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from lowbit.auto_quip import QuipQuantizer
from lowbit.cli import MISTAKES, print_error
from lowbit.cli.parameters import meaning
from lowbit.cli.progress import RunProgress
from lowbit.cli.screen import console
from lowbit.models.quiet import quiet


def auto_quip(
    model_name: Annotated[
        str, Option("--model_name", metavar="MODEL", help="Folder of a model, or its hub id.")
    ],
    quant_dir: Annotated[Path, Option("--quant_dir", metavar="OUT", help="Folder to write.")],
    codebook: Annotated[
        str, Option("--codebook", help=meaning(QuipQuantizer, "codebook"))
    ] = "E8P12",
    dataset: Annotated[
        str, Option("--dataset", help="Calibration text: wikitext2, c4, ptb, pile, mix or a file.")
    ] = "wikitext2",
    nsamples: Annotated[
        int, Option("--nsamples", min=1, max=65536, help=meaning(QuipQuantizer, "nsamples"))
    ] = 4096,
    quip_tune_iters: Annotated[
        int,
        Option(
            "--quip_tune_iters", min=0, max=1024, help=meaning(QuipQuantizer, "quip_tune_iters")
        ),
    ] = 10,
    modules_to_not_convert: Annotated[
        str,
        Option(
            "--modules_to_not_convert",
            help="Parts of the names of linears that stay in float, separated by commas. Default: "
            "none.",
        ),
    ] = "",
    merge_suv: Annotated[
        bool,
        Option(
            "--merge_suv",
            help="Merge sign vectors into norms and neighbouring linears where the block's output "
            "does not change.",
        ),
    ] = False,
) -> None:
    """Quantize a model with QuIP#; lowbit quantize --recipe quip-e8p-2bit has more options."""
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
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(auto_quip)
    try:
        app(prog_name="auto_quip")
    except MISTAKES as error:
        print_error(error)
        sys.exit(1)
