"""lowbit dequantize: writes a quantized folder as a float one."""

from lowbit.checkpoint.output import size_of
from lowbit.cli.convert import print_changes
from lowbit.cli.parameters import CopyCode, NewOut, QuantizedModel
from lowbit.cli.screen import console
from lowbit.convert import dequantize as restore
from lowbit.models.locate import locate


def dequantize(
    model: QuantizedModel,
    out: NewOut,
    trust_remote_code: CopyCode = False,
) -> None:
    """Write a quantized model in float, for other programs."""
    folder, screen = locate(model, trust_remote_code), console()
    restore(folder, out, trust_remote_code=trust_remote_code)
    print_changes(screen, folder, out)
    before, after = size_of(folder), size_of(out)
    bits = f"{before.model:.2f} → {after.model:.2f} bits per parameter"
    screen.print(f"{bits}; what quantization lost stays lost", soft_wrap=True)
