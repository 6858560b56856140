"""QuIP: method.py is the method, the other files are what only it uses."""

from lowbit.methods.quip.method import QuIP

__all__ = ["QuIP"]
