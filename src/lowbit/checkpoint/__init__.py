"""Reads and writes checkpoints on disk; the only package that imports safetensors.

Reading:
recognize.py:        what a folder is, and what to do with one that lowbit cannot use.
no_weights.py:       what a folder without safetensors holds instead.
other_programs.py:   what other programs quantized.
inside.py:           files of a folder, without following links that lead out of it.
reader.py:           any Hugging Face folder, tensor by tensor.
low_precision.py:    weights that are stored in FP8 or FP4, as float.
quantized_folder.py: a quantized folder, layer by layer.
verify.py:           checks of the config.json of a quantized folder.
hashes.py:           compares files with the sizes and hashes that were stated of them.
integrity.py:        compares a whole quantized folder with them.
layers.py:           quantized layers from their entries and tensors.
slices.py:           widths and sizes of the slices of a MatQuant folder.
learned.py:          the learned parameters of an earlier run.

Writing:
writer.py:           the folder of a run, block by block; an interrupted run can continue.
worker_writer.py:    the folder of a run that several workers write.
claims.py:           which of them makes which block.
records.py:          what the writer has finished; it is checked before a run continues.
kept.py:             folders that a stopped run leaves for the next one.
accept.py:           takes an edited file as right.
folder.py:           a folder at once.
provenance.py:       keeps paths of the maker's machine out of what is written.
card.py:             README.md, the model card.
card_facts.py:       what cards say of a folder.
companions.py:       the files other than weights that belong to a model.
output.py:           config.json of a quantized folder, and sizes in bits per weight.
ranges.py:           names of many layers as one entry of config.json.
"""

from lowbit.checkpoint.low_precision import open_checkpoint
from lowbit.checkpoint.quantized_folder import QuantizedFolder
from lowbit.checkpoint.reader import CheckpointReader, TensorInfo, file_sha256
from lowbit.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "QuantizedFolder",
    "TensorInfo",
    "file_sha256",
    "open_checkpoint",
]
