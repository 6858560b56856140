"""Restorative LoRA (PTQ1.61, arXiv 2502.13179): move a model to where it quantizes well.

A first pass quantizes the model; low-rank adapters are then trained on the quantized weights with
the next-token loss, and merged. What comes out is a float model for `quantize`. That is training,
not calibration, and results that used it say so. It is the one stage that needs the whole model in
memory.

options.py says how adapters are trained, packing.py cuts the text, lora.py trains and merges,
stages.py goes from folder to folder and can be interrupted. Only lora.py imports peft.
"""

from lowbit.preprocess.options import LoRA
from lowbit.preprocess.stages import MARK, preprocess

__all__ = ["MARK", "LoRA", "preprocess"]
