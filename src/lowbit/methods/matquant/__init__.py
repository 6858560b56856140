"""MatQuant: method.py defines the method, the other files belong to it alone."""

from lowbit.methods.matquant.method import MatQuant

__all__ = ["MatQuant"]
