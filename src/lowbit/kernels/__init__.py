"""Tensor operations that formats and solvers share: bit packing, slicing, rounding, transforms."""
