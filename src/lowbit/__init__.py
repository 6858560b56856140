"""lowbit quantizes large language models after training and runs the result.

    lowbit.quantize("model", "out", lowbit.methods.OmniQuant(bits=4, group_size=128))
    model, tokenizer = lowbit.load("out")

Importing it also teaches transformers to load what it writes.
"""

from lowbit import methods
from lowbit.auto_quip import QuipQuantizer, load_quantized_model
from lowbit.calibration import Calibration
from lowbit.formats import use_backend as backend
from lowbit.formats.nested.widths import set_bits
from lowbit.load import load
from lowbit.pipeline import Estimate, plan, quantize
from lowbit.version import __version__

__all__ = [
    "Calibration",
    "Estimate",
    "QuipQuantizer",
    "__version__",
    "backend",
    "load",
    "load_quantized_model",
    "methods",
    "plan",
    "quantize",
    "set_bits",
]
