import pytest
import torch
import zoo

from lowbit.models.falcon import FALCON, key_rows, query_rows, value_rows


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name.startswith("falcon")])
def test_rows_of_the_fused_matrix_are_those_that_transformers_takes(name: str) -> None:
    model = zoo.source(name)
    attention = model.load_block(model.block_names[0]).self_attention
    rule = next(rule for rule in FALCON.folds(model.config) if rule.kind == "rotary")
    heads = rule.heads(model.config)
    queries, keys, values = (f(model.config) for f in (query_rows, key_rows, value_rows))
    numbers = torch.arange(attention.query_key_value.out_features)
    # (batch, tokens, heads, width); keys and values repeated for the queries that share them
    parts = attention._split_heads(numbers.float()[None, None])
    wanted = [part[0, 0].long() for part in parts]
    assert torch.equal(queries, wanted[0].flatten())
    for found, repeated in ((keys, wanted[1]), (values, wanted[2])):
        repeats = heads.queries // heads.keys if len(repeated) == heads.queries else 1
        assert torch.equal(found, repeated[::repeats].flatten())
    assert sorted(torch.cat([queries, keys, values]).tolist()) == numbers.tolist()
