"""lowbit generate: the continuation of a prompt, as it comes."""

from typing import Annotated

import typer
from typer import Argument, Option

from lowbit.cli.device import device_map
from lowbit.load import load_model, locate, need_tokenizer
from lowbit.models import generation


def generate(  # noqa: PLR0913 (a command's options)
    model: Annotated[str, Argument(metavar="OUT", help="A quantized folder, or any model.")],
    prompt: Annotated[str, Argument(metavar="PROMPT")],
    max_new_tokens: Annotated[int, Option(min=1, help="Where to stop at the latest.")] = 128,
    temperature: Annotated[float, Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, Option(min=0, help="Of the draws, with a temperature.")] = 0,
    device: Annotated[str, Option(metavar="cpu|cuda:N|auto")] = "auto",
    raw: Annotated[bool, Option("--raw", help="Leave out the chat template.")] = False,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Continue a PROMPT, or answer it where the tokenizer has a chat template."""
    folder = locate(model, trust_remote_code)
    tokenizer = need_tokenizer(folder, trust_remote_code)
    runner = load_model(folder, device_map(device), trust_remote_code=trust_remote_code)
    chat = bool(getattr(tokenizer, "chat_template", None)) and not raw
    tokens = generation.prompt_tokens(tokenizer, prompt, chat)
    pieces = generation.generate(runner, tokenizer, tokens, max_new_tokens, temperature, seed)
    if not chat:
        typer.secho(prompt, dim=True, nl=False)
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
    finally:
        typer.echo()
