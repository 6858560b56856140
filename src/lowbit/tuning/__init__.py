"""Tunes the vectors of a quantized model so that it predicts what the float model predicts.

Codes stay as they are, byte for byte. Scales, signs, norms and biases are trained on the divergence
of the whole model from the float model, KL(float || quantized). QuIP# and QTIP (arXiv 2402.04396,
2406.11235) and EfficientQAT (arXiv 2407.11062) end with such a training. It is training on a few
windows of text, and results that used it say "tuned".

run.py:        runs all stages, and continues an interrupted run.
options.py:    the settings.
reference.py:  checks that the float model is the one that was quantized.
teacher.py:    the predictions of the float model, kept on disk.
student.py:    the quantized model: its losses and gradients, block by block.
vectors.py:    the vectors, and their rounding to the dtype in which they are stored.
training.py:   the steps, the best values, and the states from which a stopped run continues.
write.py:      the folder of the result.
"""

from lowbit.tuning.options import TuneOptions
from lowbit.tuning.run import Tuned, tune

__all__ = ["TuneOptions", "Tuned", "tune"]
