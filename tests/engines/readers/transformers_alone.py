"""Saves the logits that plain transformers computes; runs without lowbit.

python transformers_alone.py FOLDER REQUEST.json
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

wanted = json.loads(Path(sys.argv[2]).read_text())
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert "lowbit" not in sys.modules
with torch.no_grad():
    logits = [model(torch.tensor([prompt])).logits[0, -1].tolist() for prompt in wanted["prompts"]]
print(json.dumps({"logits": logits}))
