"""One file per algorithm: chooses the numbers."""

from lowbit.methods.method import Method
from lowbit.methods.omniquant import OmniQuant
from lowbit.methods.rtn import RTN

METHODS: dict[str, type[Method]] = {method.name: method for method in (RTN, OmniQuant)}

__all__ = ["METHODS", "Method", "OmniQuant", "RTN"]
