"""OmniQuant: method.py defines the method, the other files belong to it alone."""

from lowbit.methods.omniquant.method import OmniQuant

__all__ = ["OmniQuant"]
