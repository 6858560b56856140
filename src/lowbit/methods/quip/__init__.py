"""QuIP: method.py defines the method, the other files belong to it alone."""

from lowbit.methods.quip.method import QuIP

__all__ = ["QuIP"]
