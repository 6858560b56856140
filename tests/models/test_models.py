"""Properties of every family; a new family adds a line to ZOO in tests/zoo.py."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from lowbit.blocks import BlockTask, Fold
from lowbit.blocks.capture import call_block, observed
from lowbit.blocks.experts import UnfusedExperts
from lowbit.blocks.folding import Tensors, apply_fold, apply_folds, tensors_of
from lowbit.models import FAMILIES, family_name

EXACT = 1e-5  # relative, in float32; torch's own noise on these models is 5e-7
CHANGED = 1e-2  # relative: what a half-applied fold does, at least

every_model = pytest.mark.parametrize("name", zoo.ZOO)
every_block = pytest.mark.parametrize("block", [0, 1])


def branches(task: BlockTask, tensors: Tensors) -> Tensor:
    """Output minus input of a block: compared with the residual stream, errors would look small."""
    batch = task.streams["float"][0]
    out = functional_call(task.block, tensors, (batch.hidden,), batch.kwargs)
    return (out[0] if isinstance(out, tuple) else out) - batch.hidden


def scale_for(fold: Fold, seed: int = 0) -> Tensor:
    """Random positive scales, mostly between 1/4 and 4."""
    return torch.randn(fold.size, generator=torch.Generator().manual_seed(seed)).mul(0.7).exp()


def shift_for(fold: Fold) -> Tensor | None:
    if not fold.shiftable:
        return None
    return torch.randn(fold.size, generator=torch.Generator().manual_seed(5))


def test_every_table_has_a_model() -> None:
    chosen = {name: zoo.source(name).family for name in zoo.ZOO}
    assert set(chosen.values()) == set(FAMILIES.values())
    assert {n: family.name for n, family in chosen.items()} == {
        name: line.family or line.model_type for name, line in zoo.ZOO.items()
    }
    assert {n: family_name(zoo.folder(n)) for n in zoo.ZOO} == {
        n: family.name for n, family in chosen.items()
    }
    assert family_name(zoo.folder("phi3")) == "discovered"


@pytest.mark.parametrize("name", zoo.ZOO | zoo.DISCOVERED)
def test_streamed_forward_is_that_of_transformers(name: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(zoo.folder(name)).eval()
    batch = zoo.tokens()
    with torch.no_grad():
        wanted = whole(batch).logits
        found = zoo.streamed_logits(zoo.source(name), whole, batch)
    assert wanted.std() > 0.5
    # A dense block runs the same operations; experts are summed in another order.
    mixture = any(isinstance(m, UnfusedExperts) for m in zoo.source(name).skeleton.modules())
    assert zoo.error(found, wanted) <= (2e-6 if mixture else 0)


@pytest.mark.parametrize("name", [n for n, line in zoo.ZOO.items() if line.window])
def test_blocks_with_a_sliding_window_get_its_mask(name: str) -> None:
    model = zoo.source(name)
    arguments = model.first_stream([zoo.tokens()]).arguments
    kwargs = [arguments.call(block, 0, torch.device("cpu")) for block in range(2)]
    sees = [_seen(of_block["attention_mask"]) for of_block in kwargs]
    full = [zoo.TOKENS] if name == "qwen2" else []  # max_window_layers is 1
    assert sees == [*full, *[zoo.WINDOW] * (2 - len(full))]


def _seen(mask: Tensor | None) -> int:
    """The number of tokens that the last token attends to."""
    if mask is None:
        return zoo.TOKENS
    row = mask[0, 0, -1]
    return int((row if row.dtype == torch.bool else row == 0).sum())


@every_model
def test_every_matrix_on_disk_is_in_one_group_or_skipped_by_name(name: str) -> None:
    model = zoo.source(name)
    grouped, skipped = Counter[str](), set()
    for block in model.block_names:
        linears = [linear for group in model.groups(block) for linear in group.linears]
        grouped.update(model.disk_name(f"{block}.{linear}") for linear in linears)
        skipped |= {f"{block}.{skip}" for skip in model.family.skip}
    inside = [disk for block in model.block_names for disk in model.block_tensors(block)]
    matrices = {d.removesuffix(".weight") for d in inside if len(model.reader.tensors[d].shape) > 1}
    routers = {model.disk_name(full) for full in model.left_float}
    assert set(model.left_float) <= skipped
    assert grouped == Counter(matrices - routers)


@every_model
@every_block
def test_a_group_is_all_that_reads_one_input(name: str, block: int) -> None:
    task = zoo.task(name, block, batches=1)
    inputs: dict[str, Tensor] = {}
    with observed(task.block, [n for g in task.groups for n in g.linears], inputs.__setitem__):
        call_block(task.block, task.streams["float"][0])
    firsts = [inputs[group.linears[0]] for group in task.groups]
    for group, first in zip(task.groups, firsts, strict=True):
        assert all(torch.equal(inputs[linear], first) for linear in group.linears), group.name
    read_the_same = [
        (a.name, b.name)
        for i, a in enumerate(task.groups)
        for j, b in enumerate(task.groups[:i])
        if torch.equal(firsts[i], firsts[j])
    ]
    assert not read_the_same
    assert len({group.name for group in task.groups}) == len(task.groups)


@every_model
@every_block
def test_no_fold_is_missing(name: str, block: int) -> None:
    folds = zoo.task(name, block, batches=1).folds
    assert Counter(fold.kind for fold in folds) == zoo.ZOO[name].folds[block]
    assert sum(fold.shiftable for fold in folds) == zoo.ZOO[name].shiftable
    assert len({fold.name for fold in folds}) == len(folds)


@every_model
@every_block
def test_a_random_scale_and_shift_through_every_fold_change_nothing(name: str, block: int) -> None:
    task = zoo.task(name, block, batches=1)
    tensors = tensors_of(task.block)
    wanted = branches(task, tensors)
    for fold in task.folds:
        scale, shift = scale_for(fold), shift_for(fold)
        folded = apply_fold(tensors, fold, scale, shift)
        assert zoo.error(branches(task, folded), wanted) < EXACT, fold.name
        # The same without its readers: were the fold without effect, this test could not fail.
        part = tensors | {n: folded[n] for n in folded if n.startswith(f"{fold.source}.")}
        if fold.source not in fold.readers:
            assert zoo.error(branches(task, part), wanted) > CHANGED, fold.name
        other = apply_fold(tensors, fold, torch.ones(fold.size), shift)
        assert zoo.error(branches(task, other), wanted) < EXACT, fold.name


@every_model
@every_block
def test_all_folds_at_once_change_nothing(name: str, block: int) -> None:
    task = zoo.task(name, block, batches=1)
    tensors = tensors_of(task.block)
    folds = {fold.name: fold for fold in task.folds}
    scales = {n: scale_for(fold, seed) for seed, (n, fold) in enumerate(folds.items())}
    shifts = {n: s for n, fold in folds.items() if (s := shift_for(fold)) is not None}
    folded = apply_folds(tensors, folds, scales, shifts)
    assert zoo.error(branches(task, folded), branches(task, tensors)) < EXACT
    changed = {n for n, tensor in folded.items() if not torch.equal(tensor, tensors[n])}
    ends = {end for fold in task.folds for end in (fold.source, *fold.readers)}
    assert {n.rpartition(".")[0] for n in changed} == ends


@pytest.mark.parametrize("family", ["mistral", "qwen2", "mixtral"])
def test_the_trained_llama_is_the_same_function_in_other_families(
    family: str, tmp_path: Path
) -> None:
    rewritten = zoo.rewrite(family, tmp_path / family, noise=0)
    batch = zoo.tokens(rows=1)
    with torch.no_grad():
        wanted, found = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(batch).logits
            for folder in (zoo.MODELS / "llama-mini", rewritten)
        )
    if family == "mixtral":  # equal experts, whose weights sum to 1
        assert zoo.error(found, wanted) < EXACT
    else:
        assert torch.equal(found, wanted)
    model = zoo.SourceModel(rewritten)
    assert model.family.name == family and len(model.block_names) == 6
    assert isinstance(model.load_block("model.layers.0"), nn.Module)
