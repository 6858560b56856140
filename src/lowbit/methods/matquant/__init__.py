"""MatQuant: method.py is the method, the other files are what only it uses."""

from lowbit.methods.matquant.method import MatQuant

__all__ = ["MatQuant"]
