"""A zoo: folders or hub repositories with what runs have learned, so that others need not learn it.

An entry has the learned parameters of one model, some MB, with the method, the model's hash, the
hash of the calibration text and measured perplexities. `replay` makes the quantized folder of it
and of the float model, without calibration text, and compares the result with what the entry
states.

ROOT/zoo/NAME.json                 the entry (entry.py), written last
ROOT/zoo/NAME/learned/*            the learned parameters, one file per block, as in OUT/learned
ROOT/zoo/NAME/floats.safetensors   the float tensors of the quantized folder that differ from the
                                   model's: scales, norms, biases

entry.py:   the entry and its files.
place.py:   finds a zoo on disk or on the hub, and copies entries.
tensors.py: what an entry states of the tensors of a quantized folder.
add.py:     makes an entry of a quantized folder.
replay.py:  makes the quantized folder of an entry.
"""

from lowbit.zoo.add import add
from lowbit.zoo.entry import Entry, Measured
from lowbit.zoo.place import entries, get
from lowbit.zoo.replay import Replayed, replay

__all__ = ["Entry", "Measured", "Replayed", "add", "entries", "get", "replay"]
