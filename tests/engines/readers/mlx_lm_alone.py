"""Prints the logits that mlx-lm computes on a CPU, as JSON; runs without lowbit.

python mlx_lm_alone.py FOLDER REQUEST.json
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
wanted = json.loads(Path(sys.argv[2]).read_text())
model, _ = load_model(Path(sys.argv[1]))
logits = [
    model(mx.array([prompt]))[0, -1].astype(mx.float32).tolist() for prompt in wanted["prompts"]
]
print(json.dumps({"logits": logits}))
