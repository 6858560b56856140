"""Writes the model card of an exported folder."""

from collections import Counter
from math import prod
from pathlib import Path

from lowbit.checkpoint.card import NOT_MEASURED, Card, write_new_card
from lowbit.checkpoint.card_facts import (
    MODEL_IS,
    base_model,
    made_by_of,
    measured_before,
    method_facts,
    name_of,
    pipeline_tag,
)
from lowbit.checkpoint.companions import is_weights
from lowbit.checkpoint.reader import INDEX
from lowbit.exporters.exporter import Exporter
from lowbit.exporters.plan import EXACT, ExportPlan
from lowbit.quantities import size
from lowbit.version import __version__


def write_export_card(part: Path, exporter: Exporter, plan: ExportPlan) -> None:
    """Writes the card of an exported folder that has all its other files.

    part: the folder.
    exporter: what wrote it.
    plan: what became of each layer.
    """
    folder = exporter.folder
    made_by = made_by_of(folder.config)
    name = name_of(folder.folder)
    linears, model, stored = _sizes(part, exporter, plan)
    containers = Counter(layer.container for layer in plan.layers)
    equal = all(layer.outcome == EXACT for layer in plan.layers)
    facts = (
        ("base model", name),
        *method_facts(made_by),
        ("bits per weight", f"{linears:.2f} in the quantized linears; {model:.2f} in the model"),
        ("weights", size(stored)),
        ("quantized layers", ", ".join(f"{n:,} as {kind}" for kind, n in containers.items())),
        ("compared with the folder of lowbit", "every weight equal" if equal else _outcome(plan)),
        ("made with", f"lowbit {__version__}; see export.json"),
    )
    method = (made_by.get("method") or {}).get("name", "")
    card = Card(
        title=f"{name}, quantized by lowbit, for {exporter.readers}",
        facts=facts,
        usage="\n\n".join((MODEL_IS, exporter.usage, *plan.notes)),
        library=exporter.library,
        tags=((method,) if method.isidentifier() else ()) + exporter.tags,
        measured=_measured(exporter) or NOT_MEASURED,
        pipeline=pipeline_tag(folder.config),
    )
    write_new_card(part, folder.folder, base_model(folder.folder), card)


def _measured(exporter: Exporter) -> str | None:
    """Returns what was measured on the quantized folder; its slices would measure differently."""
    return None if exporter.options.bits is not None else measured_before(exporter.folder.folder)


def _outcome(plan: ExportPlan) -> str:
    counts = Counter(layer.outcome for layer in plan.layers)
    return "; ".join(f"{count:,} layers: {outcome}" for outcome, count in counts.most_common(3))


def _sizes(part: Path, exporter: Exporter, plan: ExportPlan) -> tuple[float, float, int]:
    """Returns bits per weight of the linears, bits per parameter of the model, and bytes of files.

    The whole files count for the model, with their headers, and in GGUF with the tokenizer.
    """
    folder = exporter.folder
    weights = sum(prod(folder.entries[layer.name]["shape"]) for layer in plan.layers)
    others = [name for shard in folder.shards() for name in shard.others]
    biases = [f"{name}.bias" for name in folder.entries]
    stored = folder.reader.tensors
    rest = sum(prod(stored[name].shape) for name in (*others, *biases) if name in stored)
    files = [path for path in part.iterdir() if is_weights(path) and path.name != INDEX]
    size_of_files = sum(path.stat().st_size for path in files)
    linears = 8 * sum(layer.bytes for layer in plan.layers) / weights
    return linears, 8 * size_of_files / (weights + rest), size_of_files
