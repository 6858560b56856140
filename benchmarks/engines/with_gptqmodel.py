"""Prints what GPTQModel makes of prompts: python with_gptqmodel.py FOLDER REQUEST.json TOKENS"""

import json
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel

folder, request, count = sys.argv[1:]
asked = json.loads(Path(request).read_text())
model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH)
first, tokens = [], []
with torch.no_grad():
    for prompt in asked["prompts"]:
        ids = torch.tensor([prompt])
        values = model.model(ids).logits[0, -1].float().log_softmax(0).tolist()
        first.append({str(token): value for token, value in enumerate(values)})
        made = model.model.generate(ids, max_new_tokens=int(count), do_sample=False)
        tokens.append(made[0, len(prompt) :].tolist())
print(json.dumps({"next": first, "tokens": tokens}))
