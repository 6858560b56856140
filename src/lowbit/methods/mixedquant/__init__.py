"""MixedQuant: method.py defines the method, the other files belong to it alone."""

from lowbit.methods.mixedquant.method import MixedQuant

__all__ = ["MixedQuant"]
