"""Lets vLLM run folders that lowbit has quantized, in their own formats.

vLLM finds `register` by the entry point `vllm.general_plugins` as soon as lowbit is installed
beside it, so that `vllm serve OUT` works. Each linear runs lowbit's own layers; what vLLM stacks
(queries, keys and values; gate and up) runs as several of them, whose outputs are joined.

`config.py` is the quantization method that vLLM sees, `linear.py` and `experts.py` are what it
calls for linears and for mixtures of experts, `pieces.py` collects tensors and builds layers, and
`cutting.py` cuts a layer for tensor parallelism. Only the first three import vLLM.
"""


def register() -> None:
    """Registers the quantization method "lowbit" with vLLM, which calls this in every process."""
    import lowbit.vllm_plugin.config  # noqa: F401
