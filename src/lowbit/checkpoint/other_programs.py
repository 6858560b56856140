"""Finds out which other program has quantized a checkpoint, and says what a user can do then.

Two things tell: the quantization_config in config.json, and the names and dtypes of the tensors.
Codes must never be taken for weights, and a scale beside a weight must never be ignored: the model
would run, and compute something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.checkpoint.reader import TensorInfo

LOWBIT = "lowbit"
SECTIONS = ("quantization_config", "compression_config")  # the second in older compressed-tensors
# The parts of a config.json in which settings of the language model may stand as well.
INNER = ("text_config", "llm_config", "language_config")

# By quant_method in config.json: what a user calls the program or the layout.
PROGRAMS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "sparseml": "compressed-tensors",
    "fp8": "FP8 with scales",
    "fbgemm_fp8": "FP8 with scales (FBGEMM)",
    "mxfp4": "MXFP4",
    "quip": "QuIP-for-all or AutoQuIP",
    "modelopt": "ModelOpt",
    "torchao": "torchao",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "quark": "Quark",
    "bitnet": "BitNet",
    "auto-round": "AutoRound",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
}
LAYOUTS = (PROGRAMS["fp8"], PROGRAMS["fbgemm_fp8"], PROGRAMS["mxfp4"])  # of several programs
# Files in which older programs describe what they did.
FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
DEFAULT_ADVICE = (
    "name the float model that it was made from, or write its weights in float with the program "
    "that quantized it"
)
TRANSFORMERS_ADVICE = (
    "name the float model that it was made from; if there is none, load it in transformers with "
    "quantization_config={config}(dequantize=True), save it with save_pretrained, and use that"
)
ADVICE = {
    PROGRAMS["fp8"]: TRANSFORMERS_ADVICE.format(config="FineGrainedFP8Config"),
    PROGRAMS["mxfp4"]: TRANSFORMERS_ADVICE.format(config="Mxfp4Config"),
    **{
        PROGRAMS[method]: f"convert it with: lowbit convert {{folder}} CONVERTED --from {name}, "
        "then use CONVERTED; or name the float model that it was made from"
        for method, name in (("gptq", "gptq"), ("awq", "awq"), ("compressed-tensors", "ct"))
    },
    PROGRAMS["auto-round"]: "convert it with: lowbit convert {folder} CONVERTED --from gptq (or "
    "awq: as packing_format in config.json says), then use CONVERTED; or name the float model that "
    "it was made from",
    PROGRAMS["quip"]: "convert it with: lowbit convert {folder} CONVERTED --from quip, then use "
    "CONVERTED",
}

# Last parts of the names of tensors that hold codes or belong to codes, and who writes them.
CODES = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "Qidxs": PROGRAMS["quip"],
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "W_q": "HQQ",
}
# Ends of the names of scales and zero points that belong to the tensor without that end.
SCALES = ("_scale", "_scale_inv", "_scale_2", "_scales", "_global_scale", "_zero_point")
# First parts of the names of scales that belong to the module's weight.
OF_THE_MODULE = ("input", "output", "weight", "q", "k", "v")
FLOAT_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)


def stated_quantization(config: Mapping[str, Any]) -> Any:
    """Returns the quantization_config of a config.json; None if it is absent, null or empty.

    It may stand one level deeper, as in the text_config of a model that also sees images.
    """
    inner = (config.get(name) for name in INNER)
    for holder in (config, *(part for part in inner if isinstance(part, Mapping))):
        for name in SECTIONS:
            if holder.get(name) not in (None, {}):
                return holder[name]
    return None


def program_of(section: Any) -> str:
    """Returns the program that wrote a quantization_config, as a user calls it.

    section: the value of `stated_quantization`, not None.
    """
    fields = section if isinstance(section, Mapping) else {"quant_method": section}
    method = fields.get("quant_method")
    if method is None and any(fields.get(f"load_in_{bits}bit") for bits in (4, 8)):
        method = "bitsandbytes"
    if not isinstance(method, str) or not method:
        return "another program"
    return LOWBIT if method == LOWBIT else PROGRAMS.get(method.lower(), repr(method))


def quantized_by(program: str) -> str:
    """Returns "quantized by PROGRAM", or "quantized to LAYOUT". program: from `program_of`"""
    return f"quantized {'to' if program in LAYOUTS else 'by'} {program}"


def advice(program: str, folder: object) -> str:
    """Returns what to do with a checkpoint of another program. program: from `program_of`"""
    return ADVICE.get(program, DEFAULT_ADVICE).format(folder=folder)


@dataclass(frozen=True)
class Codes:
    """A tensor that is, or shows, a weight that another program has quantized.

    name: of the tensor, on disk.
    program: the program, if the name of the tensor tells.
    what: what the tensor is, in words that follow its name.
    """

    name: str
    program: str | None
    what: str


def codes_in(tensors: Mapping[str, TensorInfo]) -> Codes | None:
    """Returns the first tensor of a checkpoint that is no float weight, or a scale of one.

    tensors: all tensors, by name on disk.

    Returns None if all weights are float weights. Integers that are no weights, such as masks and
    positions, are no codes.
    """
    for name, info in tensors.items():
        owner, _, last = name.rpartition(".")
        if last in CODES:
            return Codes(name, CODES[last], "which that program writes in the place of a weight")
        if last == "weight" and info.dtype not in (*FLOAT_WEIGHTS, torch.float64):
            what = f"a weight stored as {_named(info.dtype)}, so its values are codes"
            return Codes(name, None, what)
        for end in SCALES:
            scaled = _scaled(owner, last, end, tensors)
            if scaled is not None:
                what = f"a scale or zero point of {scaled}, whose values are therefore codes"
                return Codes(name, None, what)
    return None


def _scaled(owner: str, last: str, end: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The tensor that a scale belongs to; None if the name is not that of a scale."""
    if not last.endswith(end):
        return None
    first = last.removesuffix(end)
    dot = f"{owner}." if owner else ""
    names = [f"{dot}{first}", f"{dot}{first}_blocks"]
    if first in OF_THE_MODULE:
        names.append(f"{dot}weight")
    return next((name for name in names if name in tensors), None)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
