"""What formats and solvers share: packed bits and their slices, rounding, transforms."""
