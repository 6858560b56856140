"""Describes a tokenizer to llama.cpp, which brings its own implementation.

Two kinds are known: byte-level BPE, whose way to split words is recognised from its regular
expression, and BPE in SentencePiece's manner with tokens such as <0x0A> for single bytes. A
tokenizer of any other kind is refused, because llama.cpp would silently tokenize differently.
"""

import re
from pathlib import Path
from typing import Any

from lowbit.checkpoint.reader import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # llama.cpp's name by regular expression
    rf"{SHORT_FORMS}|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{SHORT_FORMS}|{WORDS}|\p{{N}}|{REST}": "qwen2",
}


def tokenizer_keys(folder: Path, vocabulary: int, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of a GGUF file that describe the tokenizer of a model folder.

    vocabulary: number of rows of the embedding; ids without a token are filled up, and added tokens
        without a row are left out, since llama.cpp refuses to load a file that has them.
    config: the model's config.json, which names the first and last token of a text.

    Raises ValueError for a tokenizer that llama.cpp does not have, or would split differently.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json, from which a GGUF file gets its tokenizer. Save the "
            "tokenizer with transformers: AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    whole = read_json(path)
    model = whole.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"{path}: the tokenizer is {model.get('type')}, and gguf takes BPE only")
    if not model.get("merges"):
        raise ValueError(f"{path}: the tokenizer merges nothing, and llama.cpp needs merges")
    if max(model["vocab"].values(), default=0) >= vocabulary:
        raise ValueError(
            f"{path}: the tokenizer has {max(model['vocab'].values()) + 1:,} tokens, but the model "
            f"has {vocabulary:,}: copy the tokenizer of this model"
        )
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens, types = _tokens(whole, vocabulary)
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    if _is_byte_level(whole):
        keys["tokenizer.ggml.model"] = "gpt2"
        keys["tokenizer.ggml.pre"] = _split_name(whole, path)
        keys["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    elif model.get("byte_fallback"):
        keys["tokenizer.ggml.model"] = "llama"
        keys["tokenizer.ggml.pre"] = "default"
        keys["tokenizer.ggml.scores"] = _scores(tokens, merges)
        keys["tokenizer.ggml.add_space_prefix"] = _prepends_space(whole)
        types = [BYTE if ONE_BYTE.fullmatch(t) else k for t, k in zip(tokens, types, strict=True)]
    else:
        raise ValueError(f"{path}: llama.cpp has no BPE without bytes; export to ct or mlx")
    keys["tokenizer.ggml.token_type"] = types
    special = _special_keys(folder, whole, config)
    lost = {key for key, value in special.items() if key.endswith("_id") and value >= vocabulary}
    return keys | {key: value for key, value in special.items() if key not in lost}


def tokens_without_rows(whole: dict[str, Any], vocabulary: int) -> list[str]:
    """Returns the added tokens that the embedding has no row for.

    whole: the content of tokenizer.json.
    vocabulary: number of rows of the embedding.
    """
    added = whole.get("added_tokens") or []
    return [str(each["content"]) for each in added if each["id"] >= vocabulary]


def _tokens(whole: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Returns the token and its type for every id."""
    by_id: dict[int, tuple[str, int]] = {
        number: (token, NORMAL) for token, number in whole["model"]["vocab"].items()
    }
    for added in whole.get("added_tokens") or []:
        kind = CONTROL if added.get("special") else USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    unknown = whole["model"].get("unk_token")
    listed = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(vocabulary)]
    types = [UNKNOWN if unknown is not None and t == unknown else kind for t, kind in listed]
    return [token for token, _ in listed], types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Returns a score for each token: what is merged earlier scores higher."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _parts(section: Any) -> list[dict[str, Any]]:
    """Returns the members of a normalizer, pre-tokenizer or post-processor, which may be one."""
    if not isinstance(section, dict):
        return []
    for members in ("normalizers", "pretokenizers", "processors"):
        if isinstance(section.get(members), list):
            return [part for member in section[members] for part in _parts(member)]
    return [section]


def _is_byte_level(whole: dict[str, Any]) -> bool:
    return any(part.get("type") == "ByteLevel" for part in _parts(whole.get("pre_tokenizer")))


def _split_name(whole: dict[str, Any], path: Path) -> str:
    """Returns llama.cpp's name of the way in which a byte-level tokenizer splits words."""
    parts = _parts(whole.get("pre_tokenizer"))
    splits = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    level = next(part for part in parts if part.get("type") == "ByteLevel")
    if len(parts) == 1 and level.get("use_regex") and not level.get("add_prefix_space"):
        return "gpt-2"
    if len(splits) == 1 and len(parts) == 2 and splits[0] in SPLITS:
        return SPLITS[splits[0]]
    raise ValueError(
        f"{path}: llama.cpp's name for the way in which this tokenizer splits words is not known, "
        f"and a wrong one would silently tokenize wrongly; known are gpt-2, "
        f"{' and '.join(SPLITS.values())}. Export to ct or mlx"
    )


def _prepends_space(whole: dict[str, Any]) -> bool:
    normalizers = _parts(whole.get("normalizer"))
    prepends = any(n.get("type") == "Prepend" and n.get("prepend") == SPACE for n in normalizers)
    words = _parts(whole.get("pre_tokenizer"))
    return prepends or any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme") in ("always", "first")
        for part in words
    )


def _special_keys(folder: Path, whole: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Returns the ids of special tokens, whether a text begins with one, and the chat template."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    ids = dict(whole["model"]["vocab"])
    ids |= {added["content"]: added["id"] for added in whole.get("added_tokens") or []}
    keys: dict[str, Any] = {}
    for kind, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = ids.get(token)
        if number is None and isinstance(config.get(f"{kind}_token_id"), int):
            number = config[f"{kind}_token_id"]
        if number is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = number
    first = _first_special(whole)
    keys["tokenizer.ggml.add_bos_token"] = first is not None and ids.get(first) == keys.get(
        "tokenizer.ggml.bos_token_id"
    )
    keys["tokenizer.ggml.add_eos_token"] = False
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    text = text or settings.get("chat_template")
    if isinstance(text, str):
        keys["tokenizer.chat_template"] = text
    return keys


def _first_special(whole: dict[str, Any]) -> str | None:
    """Returns the token that the post-processor puts before every text; None: there is none."""
    for part in _parts(whole.get("post_processor")):
        single = part.get("single") or []
        if single and "SpecialToken" in single[0]:
            return str(single[0]["SpecialToken"]["id"])
    return None
