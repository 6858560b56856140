"""Rounds weights to grids with straight-through gradients: one function for autograd.

reference.py: the function in torch, forward and backward; it is the definition.
"""

from lowbit.kernels.fake_quantization.reference import fake_quantize, nearest_code

__all__ = ["fake_quantize", "nearest_code"]
