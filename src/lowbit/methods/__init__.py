"""One file per algorithm: chooses the numbers."""

from lowbit.methods.gptq import GPTQ
from lowbit.methods.method import Method
from lowbit.methods.omniquant import OmniQuant
from lowbit.methods.rtn import RTN

METHODS: dict[str, type[Method]] = {method.name: method for method in (RTN, GPTQ, OmniQuant)}

__all__ = ["GPTQ", "METHODS", "Method", "OmniQuant", "RTN"]
