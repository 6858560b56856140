"""Quantization methods, one file or folder each. A method chooses codes, scales and zero points."""

from lowbit.methods.gptq import GPTQ
from lowbit.methods.matquant import MatQuant
from lowbit.methods.method import Method
from lowbit.methods.mixedquant import MixedQuant
from lowbit.methods.omniquant import OmniQuant
from lowbit.methods.ptq161 import PTQ161
from lowbit.methods.quip import QuIP
from lowbit.methods.rtn import RTN
from lowbit.methods.trellis import Trellis

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (RTN, GPTQ, OmniQuant, MatQuant, QuIP, Trellis, PTQ161, MixedQuant)
}

__all__ = [
    "GPTQ",
    "METHODS",
    "MatQuant",
    "Method",
    "MixedQuant",
    "OmniQuant",
    "PTQ161",
    "QuIP",
    "RTN",
    "Trellis",
]
