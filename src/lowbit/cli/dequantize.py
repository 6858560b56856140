"""lowbit dequantize: converts a quantized folder to a float one."""

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
    """Convert a quantized model to float, for other programs."""
    folder, screen = locate(model, trust_remote_code), console()
    restore(folder, out, trust_remote_code=trust_remote_code)
    print_changes(screen, folder, out)
    before, after = size_of(folder), size_of(out)
    bits = f"{before.model:.2f} → {after.model:.2f} bits per parameter"
    screen.print(f"{bits}; the error of quantization stays in the weights", soft_wrap=True)
