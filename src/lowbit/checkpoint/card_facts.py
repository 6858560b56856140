"""Says on model cards how a folder was made and how it is loaded, from its config.json alone."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint.card import (
    BASE,
    NOT_MEASURED,
    Card,
    measured_part,
    read_metadata,
    write_new_card,
)
from lowbit.checkpoint.inside import hub_id_of
from lowbit.checkpoint.low_precision import is_low_precision
from lowbit.checkpoint.other_programs import LOWBIT, program_of, stated_quantization
from lowbit.checkpoint.output import Size, size_of_tensors
from lowbit.checkpoint.reader import CheckpointReader, read_json
from lowbit.checkpoint.verify import quantized_entries
from lowbit.quantities import size
from lowbit.version import __version__

MODEL_IS = "MODEL stands for this folder, or for its id on the hub."
PREPROCESSED = "lowbit_preprocess"  # in config.json of what lowbit preprocess wrote
GRIDS = ("uniform", "nested", "dense")  # formats that some exports hold besides --to dense


def write_card(folder: Path, config: Mapping[str, Any], source: Path) -> None:
    """Writes the card of a folder that has all its weights, unless there is a card.

    folder: quantized, or float.
    config: the content of its config.json, which need not be written yet.
    source: the folder that it was made of.
    """
    make = _float if lowbit_section(config) is None else _quantized
    card = make(CheckpointReader(folder), config, source)
    write_new_card(folder, source, base_model(source), card)


def lowbit_section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the quantization_config that lowbit wrote; None if there is none."""
    section = stated_quantization(config)
    wrote = isinstance(section, dict) and program_of(section) == LOWBIT
    return section if wrote else None


def made_by_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how lowbit quantized a folder; empty for a float model."""
    made_by = (lowbit_section(config) or {}).get("made_by")
    return made_by if isinstance(made_by, dict) else {}


def base_model(source: Path) -> str | None:
    """Returns the hub id of the float model that a folder was made of; None if it is not known.

    source: the folder from which the new one is made: the float model itself, or a quantized one.
    """
    config = _config_of(source)
    section = stated_quantization(config)
    if section is None or is_low_precision(section):
        return hub_id_of(source)
    stated = read_metadata(source).get(BASE)
    one = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    named = one or made_by_of(config).get("source")
    return named if isinstance(named, str) and named.count("/") == 1 else None


def name_of(source: Path) -> str:
    """Returns the name of the float model that a folder was made of: a hub id, or a folder's name.

    source: as for `base_model`.
    """
    stated = made_by_of(_config_of(source)).get("source")
    return base_model(source) or (str(stated) if stated else source.absolute().name)


def method_facts(made_by: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the lines of a card's table that say how a folder was quantized."""
    method = made_by.get("method")
    facts = []
    if made_by.get("recipe"):
        facts.append(("recipe", f"`{made_by['recipe']}`"))
    if isinstance(method, dict) and method.get("name"):
        fields = (f"{k}={v}" for k, v in method.items() if k != "name" and _is_scalar(v))
        facts.append(("method", f"`{method['name']}({', '.join(fields)})`"))
    if isinstance(made_by.get("sliced"), dict):
        facts.append(("slice", f"cut from `{made_by['sliced'].get('master')}`"))
    if (tuned := tuned_fact(made_by)) is not None:
        facts.append(("tuned", tuned))
    text = made_by.get("calibration")
    if isinstance(text, dict):
        names = ", ".join(_source_name(one) for one in text.get("sources") or ())
        facts.append(
            (
                "calibration",
                f"{text.get('samples')} windows of {text.get('seqlen')} tokens: {names}",
            )
        )
    return facts


def tuned_fact(made_by: Mapping[str, Any]) -> str | None:
    """Returns in words how `lowbit tune` trained a folder; None if it did not."""
    tuned = made_by.get("tuned")
    if not isinstance(tuned, dict):
        return None
    found = tuned.get("divergence")
    before, after = (found.get(k) if isinstance(found, dict) else None for k in ("before", "after"))
    gain = ""
    if isinstance(before, float) and isinstance(after, float):
        gain = f"; KL from the float model {before:.4f} → {after:.4f} on held-out windows"
    tokens = tuned.get("tokens")
    seen = f"{tokens:,} tokens" if isinstance(tokens, int) else "an unknown number of tokens"
    return f"{tuned.get('steps')} steps on {seen}{gain}"


def bits_fact(found: Size) -> tuple[str, str]:
    """Returns the line of a card's table that says how large the weights are."""
    return (
        "bits per weight",
        f"{found.linears:.2f} in the quantized linears, scales and zero points included; "
        f"{found.model:.2f} in the whole model",
    )


def loading(config: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the Auto class of transformers that loads a model, and further arguments for it."""
    whole = pipeline_tag(config) != "text-generation"
    remote = ", trust_remote_code=True" if config.get("auto_map") else ""
    return f"AutoModelFor{'ImageTextToText' if whole else 'CausalLM'}", remote


def pipeline_tag(config: Mapping[str, Any]) -> str:
    """Returns what the hub calls the use of a model."""
    return "image-text-to-text" if "vision_config" in config else "text-generation"


def in_transformers(config: Mapping[str, Any], before: str = "") -> str:
    """Returns Python code that loads MODEL in transformers. before: a line that comes first"""
    auto, remote = loading(config)
    return (
        f"```python\n{before}from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("MODEL"{remote})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("MODEL"{remote})\n```\n'
    )


def _quantized(reader: CheckpointReader, config: Mapping[str, Any], source: Path) -> Card:
    section, made_by = lowbit_section(config) or {}, made_by_of(config)
    name = name_of(source)
    entries = quantized_entries(section, reader.folder)
    found = size_of_tensors(reader, entries)
    formats = Counter(entry["format"] for entry in entries.values())
    layers = ", ".join(f"{count:,} in format `{kind}`" for kind, count in sorted(formats.items()))
    facts = [
        ("base model", name),
        *method_facts(made_by),
        bits_fact(found),
        ("weights", f"{size(found.bytes)} of safetensors"),
        ("quantized layers", layers),
    ]
    rounded = {e["activation"]["bits"] for e in entries.values() if e.get("activation")}
    if rounded:
        bits = " and ".join(map(str, sorted(rounded)))
        rotated = any(entry.get("rotation") for entry in entries.values())
        how = "rotated and rounded" if rotated else "rounded"
        facts.append(("activations", f"inputs of linears are {how} to {bits} bits"))
    facts.append(("made with", f"lowbit {_version(made_by)}"))
    method = (made_by.get("method") or {}).get("name", "")
    return Card(
        title=f"{name}, quantized by lowbit to {found.linears:.2f} bits per weight",
        facts=tuple(facts),
        usage=_usage(config, set(formats)),
        tags=(method,) if method.isidentifier() else (),
        pipeline=pipeline_tag(config),
    )


def _usage(config: Mapping[str, Any], formats: set[str]) -> str:
    remote = loading(config)[1]
    others = (
        "Other programs read exports: `lowbit export MODEL DEST --to ct` (vLLM, SGLang), `gguf` "
        "(llama.cpp), `mlx` and others; `--check-only` says what would become of each layer."
        if formats <= set(GRIDS)
        else "Other programs read its weights in float: `lowbit export MODEL DEST --to dense`."
    )
    rounds = (lowbit_section(config) or {}).get("attention")
    vllm = "" if rounds else "In vLLM, where lowbit is installed too: `vllm serve MODEL`.\n\n"
    return (
        f"{MODEL_IS}\n\n"
        f'```python\nimport lowbit\n\nmodel, tokenizer = lowbit.load("MODEL"{remote})\n```\n\n'
        "In transformers:\n\n"
        f"{in_transformers(config, 'import lowbit  # lets transformers read the folder' + chr(10))}"
        "\nIn a terminal: `lowbit chat MODEL`, `lowbit serve MODEL` (an OpenAI-compatible server), "
        f"`lowbit generate MODEL PROMPT`.\n\n{vllm}{others}"
    )


def _float(reader: CheckpointReader, config: Mapping[str, Any], source: Path) -> Card:
    """The card of a float model: dequantized, trained by lowbit preprocess, or converted."""
    made_by, name = made_by_of(_config_of(source)), name_of(source)
    found = size_of_tensors(reader, {})
    facts = [("base model", name), *method_facts(made_by)]
    measured = None
    if made_by:
        title = f"{name}, quantized by lowbit and stored in float"
        facts.append(("weights", f"{size(found.bytes)}, float; the error of quantization stays"))
        measured = measured_before(source)
    else:
        trained = PREPROCESSED in config
        title = f"{name}, {'prepared by lowbit preprocess' if trained else 'as safetensors'}"
        facts.append(("weights", f"{size(found.bytes)}, float"))
    facts.append(("made with", f"lowbit {__version__}"))
    return Card(
        title=title,
        facts=tuple(facts),
        usage=f"{MODEL_IS}\n\n{in_transformers(config)}",
        measured=measured or NOT_MEASURED,
        pipeline=pipeline_tag(config),
    )


def measured_before(source: Path) -> str | None:
    """Returns what the card of a quantized folder says about measurements, for what is made of it.

    None: it says nothing.
    """
    inside = (measured_part(source) or NOT_MEASURED).strip()
    if inside in ("", NOT_MEASURED):
        return None
    return f"Measured on the folder of lowbit from which this one was made.\n\n{inside}"


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _version(made_by: Mapping[str, Any]) -> str:
    versions = made_by.get("versions")
    return str(versions.get("lowbit")) if isinstance(versions, dict) else __version__


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _source_name(source: Any) -> str:
    return Path(str(source.get("name") if isinstance(source, dict) else source)).name
