"""PTQ161: method.py is the method, the other files are what only it uses."""

from lowbit.methods.ptq161.method import PTQ161

__all__ = ["PTQ161"]
