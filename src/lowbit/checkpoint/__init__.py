"""Checkpoints on disk; the only package that imports safetensors.

reader.py reads any Hugging Face folder tensor by tensor. quantized_folder.py reads a quantized one
layer by layer, with the checks of verify.py. writer.py writes OUT block by block and continues an
interrupted run; folder.py writes a folder in one go, companions.py the files that go with weights.
"""

from lowbit.checkpoint.quantized_folder import QuantizedFolder
from lowbit.checkpoint.reader import CheckpointReader, TensorInfo, file_sha256
from lowbit.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointReader", "CheckpointWriter", "QuantizedFolder", "TensorInfo", "file_sha256"]
