"""Prints names, shapes, dtypes and hashes of the tensors that TVM reads; runs without lowbit.

python tvm_tensor_cache.py FOLDER REQUEST.json
"""

import hashlib
import json
import sys

import tvm
from tvm.contrib import tvmjs

found, _ = tvmjs.load_tensor_cache(sys.argv[1], tvm.cpu())
print(
    json.dumps(
        {
            name: [
                list(map(int, tensor.shape)),
                str(tensor.dtype),
                hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
            ]
            for name, tensor in found.items()
        }
    )
)
