"""llama.cpp as a peer: a model of random weights in GGUF, and its time for one more token.

The libraries are called through ctypes. They are those of a build of llama.cpp, such as the npm
package `@node-llama-cpp/linux-x64` (its folder `bins/linux-x64`), which has a library for each
generation of processors. llama.cpp chooses the best of them itself.
"""

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.bench.shapes import Shape
from lowbit.config import unknown_name

# Where a block of a type holds its float16 scales: bytes from its beginning.
SCALES = {
    "Q8_0": (0,), "Q6_K": (208,), "Q5_K": (0, 2), "Q4_0": (0,), "Q4_K": (0, 2), "Q3_K": (108,),
    "Q2_K": (80, 82), "IQ3_XXS": (0,), "IQ2_XXS": (0,), "IQ1_S": (0,),
}  # fmt: skip
# The types of a grid, and those of a codebook, with their bits per weight.
GRIDS = {"Q8_0": 8.5, "Q6_K": 6.56, "Q5_K": 5.5, "Q4_0": 4.5, "Q3_K": 3.44, "Q2_K": 2.63}
CODEBOOKS = {"Q4_0": 4.5, "IQ3_XXS": 3.06, "IQ2_XXS": 2.06, "IQ1_S": 1.56}
OF_CODEBOOKS = ("lattice", "trellis", "binary")  # formats that are compared with them
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
HEAD = "Q8_0"  # type of embeddings and head
CONTEXT = 512
TOKEN = 1


class ModelParameters(ctypes.Structure):
    """llama_model_params, whose fields stay as llama.cpp sets them; larger than the original."""

    _fields_ = [("bytes", ctypes.c_uint8 * 1024)]


class ContextParameters(ctypes.Structure):
    """llama_context_params, of which the first fields are changed; larger than the original."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("bytes", ctypes.c_uint8 * 1016),
    ]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [("bytes", ctypes.c_uint8 * 56)]


class LlamaCpp:
    """The loaded libraries.

    backend: the file of the CPU library that llama.cpp chose for this machine.

    Raises ValueError if the folder has no libraries, or they cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        files = [_library(folder, name) for name in ("libggml", "libllama")]
        try:
            ggml, llama = (ctypes.CDLL(str(file)) for file in files)
            self._prepare(ggml, llama, folder)
        except (OSError, AttributeError) as error:
            raise ValueError(f"{folder}: llama.cpp's libraries cannot be used: {error}") from None

    def _prepare(self, ggml: Any, llama: Any, folder: Path) -> None:
        lines: list[str] = []
        logger = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self.llama, self._log = llama, logger(lambda _, text, __: lines.append(_decoded(text)))
        llama.llama_log_set(self._log, None)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        llama.llama_backend_init()
        loaded = [line.split("/")[-1].strip() for line in lines if "loaded CPU backend" in line]
        self.backend = loaded[-1] if loaded else "unknown"
        llama.llama_model_default_params.restype = ModelParameters
        llama.llama_context_default_params.restype = ContextParameters
        llama.llama_model_load_from_file.restype = ctypes.c_void_p
        llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, ModelParameters]
        llama.llama_init_from_model.restype = ctypes.c_void_p
        llama.llama_init_from_model.argtypes = [ctypes.c_void_p, ContextParameters]
        llama.llama_batch_get_one.restype = Batch
        llama.llama_get_memory.restype = ctypes.c_void_p
        llama.llama_get_memory.argtypes = llama.llama_free.argtypes = [ctypes.c_void_p]
        llama.llama_model_free.argtypes = [ctypes.c_void_p]
        llama.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        llama.llama_decode.argtypes = [ctypes.c_void_p, Batch]
        llama.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]

    def load(self, path: Path) -> "Model":
        """Loads a file in GGUF. Raises ValueError if llama.cpp cannot."""
        model = self.llama.llama_model_load_from_file(
            str(path).encode(), self.llama.llama_model_default_params()
        )
        parameters = self.llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = CONTEXT
        return Model(self.llama, model, self.llama.llama_init_from_model(model, parameters))


class Model:
    """A model and its context."""

    def __init__(self, llama: Any, model: int, context: int) -> None:
        if not model or not context:
            raise ValueError("llama.cpp cannot load a model of this shape and type")
        self.llama, self.model, self.context = llama, model, context

    def seconds(self, tokens: int, threads: int, together: int = 1) -> list[float]:
        """Returns the seconds of each of some passes, after an empty cache.

        tokens: passes.
        threads: threads that compute.
        together: tokens of a pass.
        """
        self.llama.llama_set_n_threads(self.context, threads, threads)
        self._clear()
        ids, times = (ctypes.c_int32 * together)(*[TOKEN] * together), []
        for _ in range(tokens):
            if together > 1:
                self._clear()
            started = time.perf_counter()
            batch = self.llama.llama_batch_get_one(ids, together)
            if self.llama.llama_decode(self.context, batch):
                raise ValueError(f"llama.cpp cannot read {together} tokens at once")
            times.append(time.perf_counter() - started)
        return times

    def _clear(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)

    def free(self) -> None:
        """Frees the memory; the model cannot be used after it."""
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


def nearest_type(form: str, bits: float) -> str:
    """Returns the type of llama.cpp whose size is nearest.

    form: name of a format of lowbit, which decides whether a grid or a codebook is compared.
    bits: real bits per weight of the linears.
    """
    types = CODEBOOKS if form in OF_CODEBOOKS else GRIDS
    return min(types, key=lambda name: abs(types[name] - bits))


def check_type(kind: str) -> None:
    """Raises ValueError for a type that `write_random` cannot write."""
    if kind not in SCALES:
        raise ValueError(f"--peer-type: {unknown_name(kind, SCALES, 'type')}")


def _library(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"--llama {folder}: there is no such folder")
    found = sorted(p for p in folder.glob(f"{name}.*") if {".so", ".dylib"} & set(p.suffixes))
    if not found:
        raise ValueError(
            f"--llama {folder}: it has no {name}: name the folder of llama.cpp's libraries, such "
            "as bins/linux-x64 of the npm package @node-llama-cpp/linux-x64"
        )
    return found[0]


def _decoded(text: bytes | None) -> str:
    return (text or b"").decode(errors="replace")


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "--peer llama.cpp needs the package gguf: pip install 'lowbit[gguf]'"
        ) from None
    return gguf


def random_blocks(draw: torch.Generator, rows: int, columns: int, kind: str) -> np.ndarray:
    """Returns rows of random blocks of a type, whose scales are 0.001. Raises ValueError."""
    gguf = _gguf()
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if columns % values:
        raise ValueError(
            f"llama.cpp's type {kind} needs a multiple of {values} inputs, but a linear has "
            f"{columns}: choose another --peer-type"
        )
    shape = (rows, columns // values, size)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw).numpy()
    for at in SCALES[kind]:
        blocks[:, :, at : at + 2] = np.array([0.001], dtype=np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_random(path: Path, kind: str, shape: Shape) -> None:
    """Writes a Llama of random weights.

    kind: type of the linears, a key of SCALES.
    """
    check_type(kind)
    gguf, draw, made = _gguf(), torch.Generator().manual_seed(0), {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.wide)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")

    def add(name: str, rows: int, columns: int, kind: str) -> None:
        if (rows, columns, kind) not in made:
            made[rows, columns, kind] = random_blocks(draw, rows, columns, kind)
        blocks = made[rows, columns, kind]
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])

    add("token_embd.weight", shape.vocabulary, shape.hidden, HEAD)
    add("output.weight", shape.vocabulary, shape.hidden, HEAD)
    ones = np.ones(shape.hidden, dtype=np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for number in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{number}.{norm}.weight", ones)
        for name, (rows, columns) in shape.linears.items():
            add(f"blk.{number}.{NAMES[name]}.weight", rows, columns, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
