"""OmniQuant: method.py is the method, the other files are what only it uses."""

from lowbit.methods.omniquant.method import OmniQuant

__all__ = ["OmniQuant"]
