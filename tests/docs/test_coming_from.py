"""The pages "Coming from" name options, fields and recipes of lowbit that exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from lowbit.cli import app
from lowbit.exporters import TARGETS
from lowbit.methods import METHODS
from lowbit.preprocess import LoRA
from lowbit.recipes import recipe_names

FOLDER = Path(__file__).parents[2] / "docs" / "coming-from"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "index.md")
GROUP: Any = typer.main.get_command(app)
OPTIONS = {
    name: {word for parameter in command.params for word in parameter.opts}
    for name, command in GROUP.commands.items()
}
# Of the five original projects, the flags that the pages must map.
REQUIRED = {
    "omniquant": "--model --output_dir --save_dir --real_quant --resume --wbits --abits "
    "--group_size --lwc --let --lwc_lr --let_lr --wd --alpha --aug_loss --epochs --symmetric "
    "--disable_zero_point --nsamples --batch_size --seed --calib_dataset --act-scales "
    "--act-shifts --net --cache_dir --eval_ppl --tasks --num_fewshot --limit --multigpu "
    "--deactive_amp --a_dynamic_method --w_dynamic_method --attn_implementation",
    "matquant": "--model --output_dir --mode --bit_list --lambda_r --batch_size --nsamples "
    "--epochs --lwc --let --lwc_lr --let_lr --aug_loss --group_size --eval_ppl --resume",
    "ptq161": "--model --output_dir --quant_type --wbits --abits --epochs --nsamples "
    "--batch_size --seed --calib_dataset --lwc --ckpt_path --eval_ppl --tasks --num_fewshot "
    "--limit --multigpu --save_dir --real_quant --resume --model_id --ckpt --lora_r -s "
    "--train_steps --dataset --data_percent --lora_path --output_path --model_path",
    "mixedquant": "--model_path --alpha --act_scales_path --quantize group_size salient_prop",
    "quip": "codebook dataset nsamples model_seqlen quip_tune_iters sigma_reg use_rand "
    "scale_override opt_resid_scale per_channel modules_to_not_convert merge_suv rescale_WH "
    "sequential batch_size --model_name --quant_dir ft_epochs ft_lr ft_susv_lr",
}


def rows(page: Path) -> list[list[str]]:
    """The cells of the tables that map flags, without their headings."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [cells for cells in found if "---" not in cells[0] and "lowbit" != cells[1]]


def code(cells: list[str]) -> list[str]:
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_named_of_lowbit_exists(page: Path) -> None:
    every = set().union(*OPTIONS.values())
    fields = {name for method in METHODS.values() for name in method.model_fields}
    fields |= {f"lora.{name}" for name in LoRA.model_fields}
    ours = [text for cells in rows(page) for text in code(cells[1:2])]
    assert len(ours) >= 8
    for text in ours:
        words = shlex.split(text)
        command = words[1] if words[0] == "lowbit" else None
        assert command is None or command in OPTIONS, text
        known = every if command is None else OPTIONS[command]
        for option, value in zip(words, [*words[1:], ""], strict=True):
            assert not option.startswith("--") or option in known, text
            if option == "--set":
                assert value.partition("=")[0] in fields, text
            if option == "--recipe" and value.islower():
                assert value in recipe_names(), text
            if option == "--method":
                assert value in METHODS, text
            if option == "--to":
                assert value in TARGETS, text


@pytest.mark.parametrize("name", REQUIRED)
def test_every_flag_of_the_original_is_mapped(name: str) -> None:
    theirs = {
        word for cells in rows(FOLDER / f"{name}.md") for t in code(cells[:1]) for word in t.split()
    }
    assert set(REQUIRED[name].split()) - theirs == set()
