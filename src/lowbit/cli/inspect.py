"""lowbit inspect: shows format, bits, size and error of each layer of a model."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Option

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.accept import accept as accept_files
from lowbit.checkpoint.card_facts import tuned_fact
from lowbit.checkpoint.output import size_of
from lowbit.checkpoint.ranges import expand
from lowbit.checkpoint.recognize import runnable_folder
from lowbit.cli.integrity import check_files
from lowbit.cli.parameters import QuantizedModel
from lowbit.cli.screen import console, shortened, size
from lowbit.formats import MANY_TOKENS, build
from lowbit.formats.embedding import tables_of
from lowbit.formats.native import NativeBackend
from lowbit.models.locate import locate
from lowbit.report.drawing import decibels
from lowbit.report.records import read_report
from lowbit.run_report import LinearReport


def inspect(
    model: QuantizedModel,
    brief: Annotated[
        bool, Option("--brief", help="Show equal layers of several blocks as one line.")
    ] = False,
    verify: Annotated[bool, Option("--verify", help="The same as lowbit verify MODEL.")] = False,
    accept: Annotated[
        list[str] | None,
        Option(
            "--accept",
            metavar="FILE",
            help="Take the present content of FILE, such as generation_config.json, as right after "
            "you edited it, and show nothing else. Not for weights. Repeatable. Default: none.",
        ),
    ] = None,
) -> None:
    """Show format, bits, size and error of each layer.

    The size of the model and the settings of its quantization are shown below the layers.
    """
    folder, screen = locate(model), console()
    if accept:
        accept_files(folder, accept)
        screen.print(f"{folder}: accepted {', '.join(accept)}", soft_wrap=True)
    if verify:
        check_files(folder, screen)
    if verify or accept:
        return
    if runnable_folder(folder).program is None:
        _print_float(folder, model, screen)
        return
    quantized = QuantizedFolder(folder)
    quantized.verify(hashes=False)
    report = read_report(folder, quantized.quantization)
    try:
        origin = _provenance(quantized.quantization.get("made_by") or {})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{folder}: made_by in config.json cannot be used. It was edited or damaged, or "
            "another version of lowbit wrote it: restore config.json"
        ) from None
    linears = {
        f"{block}.{name}": linear
        for block, found in report.blocks.items()
        for name, linear in found.linears.items()
    }
    layers = list(_layers(quantized, linears, brief))
    screen.print(_table(layers, brief))
    found = size_of(folder)
    facts = {
        "linears": _linears(quantized, found.linears),
        "embeddings": _embeddings(quantized),
        "model": f"{found.model:.2f} bits per parameter, {size(found.bytes)} in "
        f"{len(quantized.reader.files)} files",
        "in memory": _memory(quantized),
        "attention": _attention(quantized),
        **origin,
        "quantized more simply": _named(report.fallbacks),
        "in float": _named(report.left_float),
    }
    meaning = "backend: for one token and for many, on the CPU"
    meaning += "; dB: signal-to-noise ratio of the weights"
    if any(layer.proxies for layer in layers):
        meaning += "; proxy: share of the output's energy that is lost, measured with the Hessian"
    screen.print(f"{meaning}\n", style="dim", soft_wrap=True)
    shown = {name: fact for name, fact in facts.items() if fact}
    width = max(map(len, shown)) + 2
    for name, fact in shown.items():
        line = Text.assemble((f"{name:<{width}}", "bold"), fact)
        screen.print(line, soft_wrap=not screen.is_terminal)


def _print_float(folder: Path, model: str, screen: Console) -> None:
    found = size_of(folder)
    screen.print(
        f"{model} is a float model: {found.model:.2f} bits per parameter, {size(found.bytes)}; "
        "nothing in it is quantized",
        soft_wrap=True,
    )


@dataclass(frozen=True)
class _Layer:
    """A row of the table: one linear, or equal linears of several blocks.

    name: of the linear, or a range of names.
    entry: of config.json.
    bytes: of all these linears, without biases.
    weights: number of weights in all these linears.
    errors: signal-to-noise ratios in decibels, of the linears that have one.
    proxies: proxy losses, of the linears that have one.
    """

    name: str
    entry: dict[str, Any]
    bytes: int
    weights: int
    errors: list[float]
    proxies: list[float]


def _layers(
    quantized: QuantizedFolder, linears: dict[str, LinearReport], brief: bool
) -> Iterator[_Layer]:
    """Yields the rows of the table. linears: what the run reported of each linear, by full name."""
    modules = quantized.quantization["modules"] if brief else quantized.entries
    for pattern in sorted(modules, key=_numbers):
        entry = modules[pattern]
        names = list(expand({pattern: entry}))
        stored = [
            quantized.reader.tensors[tensor].bytes
            for name in names
            for tensor in quantized.tensors_of(name)
            if tensor != f"{name}.bias"
        ]
        reported = [linears[name] for name in names if name in linears]
        errors = [linear.signal_to_noise_db for linear in reported]
        proxies = [linear.proxy_loss for linear in reported if linear.proxy_loss is not None]
        weights = len(names) * prod(entry["shape"])
        yield _Layer(pattern, entry, sum(stored), weights, errors, proxies)


def _numbers(name: str) -> list[int]:
    """Returns the numbers in a name: the block, then the expert. Rows are sorted by them."""
    return [int(number) for number in re.findall(r"\d+", name)]


def _table(layers: Sequence[_Layer], brief: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("\nlayer", overflow="fold")
    table.add_column("\nformat", no_wrap=True)
    errors = "worst\ndB" if brief else "\ndB"
    table.add_column("\nbackend", overflow="fold")
    inputs = ["input\nbits"] if any(layer.entry.get("activation") for layer in layers) else []
    proxies = ["worst\nproxy" if brief else "\nproxy"] if any(x.proxies for x in layers) else []
    for name in ("\nbits", "\ngroup", *inputs, "\nsize", "real\nbits", *proxies, errors):
        table.add_column(name, justify="right", no_wrap=True)
    backends: dict[str, str] = {}  # by entry: most layers are alike
    for layer in layers:
        if (entry := repr(layer.entry)) not in backends:
            backends[entry] = _backends(layer.entry)
        rounding = layer.entry.get("activation") or {}
        table.add_row(
            layer.name,
            _format(layer.entry),
            backends[entry],
            str(layer.entry.get("bits", "")),
            str(layer.entry.get("group_size") or "row"),
            *[str(rounding.get("bits", "")) for _ in inputs],
            size(layer.bytes),
            f"{8 * layer.bytes / layer.weights:.2f}",
            *[f"{max(layer.proxies):.3g}" if layer.proxies else "" for _ in proxies],
            decibels(min(layer.errors), unit=False) if layer.errors else "",
        )
    return table


def _format(entry: dict[str, Any]) -> str:
    rotated = "rotated" if entry.get("rotation") else None
    return " ".join(filter(None, (entry["format"], entry.get("codebook"), rotated)))


def _backends(entry: dict[str, Any]) -> str:
    """What would run on the CPU: for one token, and for many if that is another one."""
    with torch.device("meta"):
        layer = build(entry)
    names = [layer.backend_for(tokens, device="cpu").name for tokens in (1, MANY_TOKENS)]
    return ", ".join(dict.fromkeys(names))


def _memory(quantized: QuantizedFolder) -> str:
    """Says how much memory the loaded model takes on the CPU, without its cache and activations."""
    packed, freed, by_entry = 0, 0, {}
    tied = bool(quantized.config.get("tie_word_embeddings"))
    for entry in quantized.entries.values():
        if tables_of({"": entry}) and not tied:  # its rows are looked up, and no kernel reads it
            continue
        if (key := repr(entry)) not in by_entry:
            by_entry[key] = _packed_bytes(entry)
        packed, freed = packed + by_entry[key][0], freed + by_entry[key][1]
    names = {tensor for name in quantized.entries for tensor in quantized.tensors_of(name)}
    stored = sum(
        tensor.bytes if name in names else max(tensor.bytes, 4 * prod(tensor.shape))
        for name, tensor in quantized.reader.tensors.items()
    )
    if not packed:
        return f"{size(stored)} on the CPU, with float tensors in float32"
    text = f"{size(stored + packed)} on the CPU, {size(packed)} of it for the kernels"
    return f'{text}; {size(stored + packed - freed)} with kernels="replace"' if freed else text


def _packed_bytes(entry: dict[str, Any]) -> tuple[int, int]:
    """Returns what kernels add to a layer's memory, and what of its codes they can replace."""
    with torch.device("meta"):
        layer = build(entry)
    backend = layer.backend_for(1, device="cpu")
    return backend.packed_bytes(layer) if isinstance(backend, NativeBackend) else (0, 0)


def _linears(quantized: QuantizedFolder, bits: float) -> str:
    count = len(quantized.entries) - len(tables_of(quantized.entries))
    return f"{count:,} of {bits:.2f} bits per weight"


def _embeddings(quantized: QuantizedFolder) -> str:
    entries = quantized.entries
    packed = [f"{name} at {entries[name]['bits']} bits" for name in tables_of(entries)]
    tied = quantized.config.get("tie_word_embeddings") and "lm_head" not in entries
    return ", ".join(packed) + (", also the output layer" if packed and tied else "")


def _attention(quantized: QuantizedFolder) -> str:
    bits = sorted({str(rounding["bits"]) for rounding in quantized.attention.values()})
    count = len(quantized.attention)
    return f"queries, keys and values of {count} at {' and '.join(bits)} bits" if bits else ""


def _provenance(made_by: dict[str, Any]) -> dict[str, str]:
    """Describes how a model was made, from made_by in config.json."""
    method = dict(made_by.get("method") or {})
    text = made_by.get("calibration") or {}
    sources = ", ".join(source["name"] for source in text.get("sources", []))
    versions = made_by.get("versions") or {}
    name = method.pop("name", "")
    fields = ", ".join(f"{field}={value}" for field, value in method.items() if value != {})
    return {
        "source": made_by.get("source", ""),
        "recipe": made_by.get("recipe") or "",
        "method": f"{name} ({fields})" if name else "",
        "tuned": tuned_fact(made_by) or "",
        "calibration": f"{text['samples']} windows of {text['seqlen']} tokens of {sources}"
        if text
        else "",
        "seed": str(made_by.get("seed", "")),
        "made with": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "device": made_by.get("device", ""),
    }


def _named(names: Any) -> str:
    return f"{len(names)}: {shortened(list(names))}, see report.json" if names else ""
