"""Restorative LoRA (PTQ1.61, arXiv 2502.13179): trains a model so that it quantizes better.

A first pass quantizes the model. Low-rank adapters are then trained on the quantized weights with
the next-token loss, and merged. The result is a float model for `quantize`. This is training, not
calibration, and results that used it say so. No other stage needs the whole model in memory.

options.py has the settings of the training, and lora.py trains and merges the adapters. stages.py
runs all stages, and continues an interrupted run. Only lora.py imports peft.
"""

from lowbit.preprocess.options import LoRA
from lowbit.preprocess.stages import MARK, preprocess

__all__ = ["MARK", "LoRA", "preprocess"]
