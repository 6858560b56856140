"""Checkpoints on disk: the only door to safetensors.

reader.py reads any Hugging Face folder tensor by tensor, writer.py writes OUT block by block and
continues an interrupted run, verify.py checks a quantized folder before anything is loaded from it.
"""

from lowbit.checkpoint.reader import CheckpointReader, TensorInfo, file_sha256
from lowbit.checkpoint.verify import QuantizedFolder
from lowbit.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointReader", "CheckpointWriter", "QuantizedFolder", "TensorInfo", "file_sha256"]
