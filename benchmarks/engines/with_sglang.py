"""Prints what SGLang makes of prompts, as JSON; it needs a GPU.

python with_sglang.py FOLDER REQUEST.json TOKENS
"""

import json
import sys
from pathlib import Path

import sglang

if __name__ == "__main__":  # it starts processes, which import this file again
    folder, request, count = sys.argv[1:]
    asked = json.loads(Path(request).read_text())
    engine = sglang.Engine(model_path=folder)
    settings = {"temperature": 0, "max_new_tokens": int(count), "ignore_eos": True}
    answers = engine.generate(
        input_ids=asked["prompts"],
        sampling_params=settings,
        return_logprob=True,
        top_logprobs_num=20,
    )
    first = [
        {str(token): value for value, token, _ in made["meta_info"]["output_top_logprobs"][0]}
        for made in answers
    ]
    print(json.dumps({"next": first, "tokens": [made["output_ids"] for made in answers]}))
    engine.shutdown()
