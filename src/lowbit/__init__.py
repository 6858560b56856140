"""lowbit quantizes large language models after training and runs the result.

    lowbit.quantize("model", "out", lowbit.methods.OmniQuant(bits=4, group_size=128))
    model, tokenizer = lowbit.load("out")

Importing it also teaches transformers to load what it writes.
"""

from lowbit import methods
from lowbit.calibration import Calibration
from lowbit.load import load
from lowbit.pipeline import quantize
from lowbit.version import __version__

__all__ = ["Calibration", "__version__", "load", "methods", "quantize"]
