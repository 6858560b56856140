"""The part of a layer that one device holds with tensor parallelism, as vLLM and SGLang cut layers.

Of N devices each holds an equal part of every linear. Linears that read what a block gets are cut
along outputs, those that write what a block returns along inputs. Attention is cut between heads;
if there are fewer heads of keys and values than devices, several devices hold the same head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.exporters.grid import Refused

# Last parts of the names of linears; those that are not named here are cut along outputs.
ALONG_INPUTS = frozenset(
    "o_proj out_proj down_proj fc2 dense dense_4h_to_h c_proj wo w2 fc_out output_linear".split()
)
COPIED = frozenset(  # every device holds the whole of it
    "gate router shared_expert_gate q_a_proj kv_a_proj_with_mqa fused_qkv_a_proj_with_mqa".split()
)
KEYS_AND_VALUES = ("k_proj", "v_proj")
HALVES = ("gate_up_proj",)  # two matrices stacked by rows, each of which is cut


@dataclass(frozen=True)
class Part:
    """The part of a layer that one device holds.

    outputs, inputs: its shape.
    devices: number of devices; 1: the part is the whole layer.
    """

    outputs: int
    inputs: int
    devices: int = 1

    def __str__(self) -> str:
        shape = f"{self.outputs} x {self.inputs}"
        whole = f"its shape {shape}"
        return whole if self.devices == 1 else f"the part {shape} of one of {self.devices} devices"


def part_of(
    name: str, shape: Sequence[int], config: Mapping[str, Any], devices: int | None
) -> Part:
    """Returns the part of a layer that one device holds.

    name: the layer's name on disk.
    shape: (out, in).
    config: config.json of the model.
    devices: number of devices; None or 1: there is one.

    Raises Refused if the devices cannot hold equal parts.
    """
    outputs, inputs = shape
    last = name.rpartition(".")[2]
    if devices is None or devices == 1 or last in COPIED:
        return Part(outputs, inputs)
    if last in ALONG_INPUTS:
        return Part(outputs, _divided(inputs, devices, "inputs"), devices)
    if last in KEYS_AND_VALUES:
        heads = key_heads(config)
        return Part(_divided(outputs, min(devices, heads or devices), "rows"), inputs, devices)
    if last in HALVES:
        return Part(2 * _divided(outputs // 2, devices, "rows of one half"), inputs, devices)
    if last == "lm_head":  # both programs fill the vocabulary up
        return Part(-(-outputs // devices), inputs)
    return Part(_divided(outputs, devices, "rows"), inputs, devices)


def _divided(count: int, parts: int, what: str) -> int:
    if count % parts:
        raise Refused(
            f"its {count} {what} cannot be divided into {parts} equal parts: choose another "
            "--tensor-parallel, or leave it out"
        )
    return count // parts


def check_heads(config: Mapping[str, Any], devices: int) -> None:
    """Raises ValueError if the heads of a model cannot be divided among devices."""
    heads = text_section(config).get("num_attention_heads", config.get("n_head"))
    if isinstance(heads, int) and heads % devices:
        raise ValueError(
            f"tensor_parallel is {devices}, and the {heads} heads of the model's attention cannot "
            f"be divided among {devices} devices: allowed are divisors of {heads}"
        )
    keys = key_heads(config)
    if keys and keys % devices and devices % keys:
        raise ValueError(
            f"tensor_parallel is {devices}, and the {keys} heads of keys and values can be neither "
            f"divided among {devices} devices nor copied to equally many: choose a divisor or a "
            f"multiple of {keys}"
        )


def key_heads(config: Mapping[str, Any]) -> int | None:
    """Returns the number of heads of keys and values; None: config.json does not state it."""
    section = text_section(config)
    heads = section.get("num_key_value_heads", section.get("num_attention_heads"))
    return heads if isinstance(heads, int) and heads > 0 else None


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the part of config.json that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config
