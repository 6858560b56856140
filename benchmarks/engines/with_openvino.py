"""Prints what OpenVINO GenAI makes of prompts, as JSON.

    python with_openvino.py FILE.gguf REQUEST.json TOKENS

Its tokenizer leaves out the BOS that GGUF files ask for (2026.4), so that it gets tokens.
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

file, request, count = sys.argv[1:]
asked = json.loads(Path(request).read_text())
pipeline = openvino_genai.LLMPipeline(file, "CPU")
settings = openvino_genai.GenerationConfig(max_new_tokens=int(count), ignore_eos=True)
tokens = []
for text, prompt in zip(asked["texts"], asked["prompts"], strict=True):
    read = pipeline.get_tokenizer().encode(text).input_ids.data.tolist()[0]
    assert read in (prompt, prompt[1:]), "its tokenizer gives other tokens"
    ids = np.array([prompt], dtype=np.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(ids * 0 + 1))
    tokens.append(pipeline.generate(inputs, settings).tokens[0])
print(json.dumps({"tokens": tokens}))
