"""llama.cpp as a peer: a model of random weights in GGUF, and its time for one more token.

The libraries are called through ctypes. They are those of a build of llama.cpp, such as the npm
package `@node-llama-cpp/linux-x64` (its folder `bins/linux-x64`), which has a library for each
generation of processors. llama.cpp chooses the best of them itself.
"""

import ctypes
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Where a block of a type holds its float16 scales: bytes from its beginning.
SCALES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82),
    "IQ2_XXS": (0,), "IQ1_S": (0,),
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
    """The loaded libraries. backend: the file of the CPU library that llama.cpp chose."""

    def __init__(self, folder: Path) -> None:
        ggml = ctypes.CDLL(str(next(folder.glob("libggml.*so*"))))
        self.llama = llama = ctypes.CDLL(str(next(folder.glob("libllama.*so*"))))
        lines: list[str] = []
        logger = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._log = logger(lambda level, text, data: lines.append((text or b"").decode()))
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
        model = self.llama.llama_model_load_from_file(
            str(path).encode(), self.llama.llama_model_default_params()
        )
        parameters = self.llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = CONTEXT
        return Model(self.llama, model, self.llama.llama_init_from_model(model, parameters))


class Model:
    """A model and its context."""

    def __init__(self, llama: Any, model: int, context: int) -> None:
        assert model and context, "llama.cpp could not load the model"
        self.llama, self.model, self.context = llama, model, context

    def seconds(self, tokens: int, threads: int) -> list[float]:
        """Returns the seconds of each of some tokens, one after the other, after an empty cache."""
        self.llama.llama_set_n_threads(self.context, threads, threads)
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        token, times = ctypes.c_int32(TOKEN), []
        for _ in range(tokens):
            started = time.perf_counter()
            batch = self.llama.llama_batch_get_one(ctypes.byref(token), 1)
            assert self.llama.llama_decode(self.context, batch) == 0
            times.append(time.perf_counter() - started)
        return times

    def free(self) -> None:
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


def random_blocks(draw: np.random.Generator, rows: int, columns: int, kind: str) -> np.ndarray:
    """Returns rows of random blocks of a type, whose scales are 0.001."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = draw.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, :, at : at + 2] = np.array([0.001], dtype=np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_random(
    path: Path, kind: str, layers: int, linears: dict[str, tuple[int, int]], vocabulary: int
) -> None:
    """Writes a Llama of random weights.

    kind: type of the linears, a key of SCALES.
    linears: (out, in) of the linears of a layer, by their names in GGUF.
    """
    draw, hidden = np.random.default_rng(0), linears["attn_q"][1]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(linears["ffn_up"][0])
    writer.add_head_count(hidden // 64)
    writer.add_head_count_kv(linears["attn_k"][0] // 64)
    writer.add_rope_dimension_count(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")

    def add(name: str, rows: int, columns: int, kind: str) -> None:
        blocks = random_blocks(draw, rows, columns, kind)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])

    add("token_embd.weight", vocabulary, hidden, HEAD)
    add("output.weight", vocabulary, hidden, HEAD)
    ones = np.ones(hidden, dtype=np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for number in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{number}.{norm}.weight", ones)
        for name, (rows, columns) in linears.items():
            add(f"blk.{number}.{name}.weight", rows, columns, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
