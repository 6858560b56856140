"""PTQ161: method.py defines the method, the other files belong to it alone."""

from lowbit.methods.ptq161.method import PTQ161

__all__ = ["PTQ161"]
