"""What the methods that rotate weights before rounding share, `quip` and `trellis`.

method.py:   their common base: the rotation, the order of work, and what the report says.
words.py:    rounds a rotated weight with feedback, and chooses the scales of its rows.
signs.py:    multiplies the random signs into norms and neighbouring linears.
finetune.py: trains signs, scales, norms and biases of a rounded block.
"""

from lowbit.methods.rotated.method import Code, Rotated

__all__ = ["Code", "Rotated"]
