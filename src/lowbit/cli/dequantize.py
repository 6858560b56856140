"""lowbit dequantize: a quantized folder back to float weights, for programs that know no lowbit."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lowbit.checkpoint.output import size_of
from lowbit.cli.convert import say_what_changed
from lowbit.cli.screen import console
from lowbit.convert import dequantize as restore
from lowbit.models.locate import locate


def dequantize(
    model: Annotated[str, Argument(metavar="OUT", help="A quantized folder.")],
    dense: Annotated[Path, Argument(metavar="DENSE", help="The folder to write.")],
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Copy Python code that comes with the model.")
    ] = False,
) -> None:
    """Write the weights that a quantized model multiplies by, as plain floats."""
    folder, screen = locate(model, trust_remote_code), console()
    restore(folder, dense, trust_remote_code=trust_remote_code)
    say_what_changed(screen, folder, dense)
    before, after = size_of(folder), size_of(dense)
    bits = f"{before.model:.2f} → {after.model:.2f} bits per parameter"
    screen.print(f"{bits}; what quantization lost stays lost", soft_wrap=True)
