"""Checks the values of a model's config.json before transformers reads them.

transformers looks at few of them: 10^30 layers never end, a NaN makes every output NaN, and of
"fp16" it only says that torch has no such attribute. Every error names the file, the field, what
stands there and what is allowed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint.other_programs import INNER
from lowbit.parsing import shorten

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# transformers builds one module after another: a larger number is a mistake, and would not end.
MOST = {**dict.fromkeys(LAYERS, 10_000), **dict.fromkeys(EXPERTS, 16_384)}
HEADS = ("num_attention_heads", "n_head", "n_heads")
POSITIVE = (*LAYERS, *HEADS, "hidden_size", "n_embd", "d_model", "vocab_size")
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
# Sizes that may be absent, null or 0, which all mean the same.
SIZES = (
    *EXPERTS,
    *("num_key_value_heads", "head_dim"),
    *("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"),
)
DTYPES = ("float32", "float16", "bfloat16")
ALIASES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16"}
ALIASES |= {"bf16": "bfloat16"} | {f"torch.{name}": name for name in DTYPES}
ROPE = ("rope_scaling", "rope_parameters")  # objects, whose fields are checked as well
WINDOW = "sliding_window"  # tokens that a token sees
EPSILONS = ("_eps", "_epsilon")  # ends of the names of what keeps a norm from dividing by 0
INT64 = 2**63 - 1
LENGTHS = "max_length"  # end of names; tokenizers write 10^30 for a length without a limit
COPY = "correct it, or copy config.json from the source of the model"


def check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError for a value of a config.json with which no model can be built or run.

    path: config.json, which errors begin with.
    config: its content. What is written for other programs, in fields that lowbit does not know, is
        only checked for numbers.
    """
    for field, value in _numbers(config, ()):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{path}: {field} is NaN: allowed are numbers; {COPY}")
        if isinstance(value, int) and abs(value) > INT64 and not field.endswith(LENGTHS):
            raise ValueError(
                f"{path}: {field} is {shorten(value)}: allowed are integers up to 2^63 - 1; {COPY}"
            )
    for name in (*INNER, "auto_map"):
        if not isinstance(config.get(name) or {}, Mapping):
            came = shorten(repr(config[name]))
            raise ValueError(f"{path}: {name} is {came}: allowed are objects and null; {COPY}")
    for start, part in _parts(config):
        for name, value in part.items():
            allowed = _allowed(name, value)
            if (name, value) == (WINDOW, 0) and part.get("use_sliding_window") is False:
                allowed = None  # how transformers writes that a Qwen2-MoE has no window
            if allowed is not None:
                raise ValueError(
                    f"{path}: {start}{name} is {shorten(repr(value))}: {allowed}; {COPY}"
                )
        _check_rotation(path, start, part)


def _check_rotation(path: Path, start: str, part: Mapping[str, Any]) -> None:
    """Raises ValueError for two bases of rotary embeddings, of which programs read one or another.

    transformers 5 reads rope_parameters, what was written for earlier versions rope_theta.
    """
    inner = part.get("rope_parameters")
    bases = part.get("rope_theta"), inner.get("rope_theta") if isinstance(inner, Mapping) else None
    if None not in bases and bases[0] != bases[1]:
        raise ValueError(
            f"{path}: {start}rope_theta is {shorten(bases[0])}, but "
            f"{start}rope_parameters.rope_theta is {shorten(bases[1])}, and transformers reads the "
            "latter alone: write one value in both places, or remove the first"
        )


def check_layers(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Raises ValueError if a config.json states more layers than its folder has tensors.

    tensors: the number of tensors in the folder. Every layer has at least one.
    """
    for start, part in _parts(config):
        for name in LAYERS:
            layers = part.get(name)
            if isinstance(layers, int) and layers > tensors:
                raise ValueError(
                    f"{path}: {start}{name} is {layers}, but the folder has only {tensors} "
                    f"tensors: {COPY}, or copy the shards that are missing"
                )


def _allowed(name: str, value: Any) -> str | None:
    """Returns what is allowed in a field, in words, if its value is not; None if it is."""
    if value is None:
        return None
    if name in ("dtype", "torch_dtype"):
        return None if value in DTYPES else _dtypes(value)
    rule = _rule(name)
    if rule is None:
        return None
    test, words = rule
    values = value if isinstance(value, list) else [value]  # one for each layer
    return None if all(test(each) for each in values) else words


def _rule(name: str) -> tuple[Callable[[Any], bool], str] | None:
    if name in CONTEXT:  # a fraction in some models of sound
        return lambda v: _is_number(v) and v >= 0, "allowed are 0 or more"
    if name in POSITIVE or name in SIZES:
        least, most = int(name in POSITIVE), MOST.get(name, INT64)
        limit = f"to {most:,}" if name in MOST else "or more"
        words = f"allowed are whole numbers, {least} {limit}"
        return lambda v: _is_integer(v) and least <= v <= most, words
    if name in ("rope_theta", "factor"):
        return lambda v: _is_finite(v) and v > 0, "allowed are numbers above 0, and not infinity"
    if name == WINDOW:  # transformers keeps so many tokens when it generates, whatever the model
        return lambda v: _is_integer(v) and v > 0, "allowed are whole numbers, 1 or more, and null"
    if name.endswith(EPSILONS):
        return lambda v: _is_finite(v) and v >= 0, "allowed are numbers from 0, and not infinity"
    return None


def _dtypes(value: Any) -> str:
    alias = ALIASES.get(value) if isinstance(value, str) else None
    meant = f", here probably {alias}" if alias else ""
    return f"allowed are {', '.join(DTYPES)}{meant}"


def _is_integer(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the parts of a config that describe the language model, and how their fields begin."""
    inner = {f"{name}.": config.get(name) for name in INNER}
    for start, part in ({"": config} | inner).items():
        if isinstance(part, Mapping):
            yield start, part
            for name in ROPE:
                yield from _objects(part.get(name), f"{start}{name}.")


def _objects(value: Any, start: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields a JSON object, and those in it, such as the rotations of each kind of layer."""
    if isinstance(value, Mapping):
        yield start, value
        for name, inner in value.items():
            yield from _objects(inner, f"{start}{name}.")


def _numbers(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, int | float]]:
    """Yields all numbers in a JSON value with the names of their fields, as "rope.factor"."""
    if isinstance(value, int | float):
        yield ".".join(shorten(key) for key in path), value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _numbers(inner, (*path, number))
