"""MixedQuant: method.py is the method, the other files are what only it uses."""

from lowbit.methods.mixedquant.method import MixedQuant

__all__ = ["MixedQuant"]
