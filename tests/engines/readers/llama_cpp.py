"""Prints log-probabilities and tokens that llama.cpp computes, as JSON; runs without lowbit.

    python llama_cpp.py FILE.gguf REQUEST.json

The request has `prompts` (lists of ids, after each of which the likeliest next tokens are wanted)
and `texts` (to tokenize).
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

LIKELIEST = 20  # tokens whose log-probabilities are asked for


def started(file: str) -> Any:
    """Returns a server that runs in this process."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel = 256, 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    return xllamacpp.Server(parameters)


def next_tokens(server: Any, prompt: list[int]) -> dict[str, float]:
    asked = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": LIKELIEST}
    answer = server.handle_completions(asked)
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return {str(other["id"]): other["logprob"] for other in token["top_logprobs"]}


def tokens(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return list(json.load(answer)["tokens"])


if __name__ == "__main__":
    running = started(sys.argv[1])
    wanted = json.loads(Path(sys.argv[2]).read_text())
    print(
        json.dumps(
            {
                "next": [next_tokens(running, prompt) for prompt in wanted["prompts"]],
                "tokens": [tokens(running, text) for text in wanted["texts"]],
            }
        )
    )
