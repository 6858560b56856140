import pytest
import torch
import zoo

from lowbit.blocks.start import Start

LEARNED = {"a.clip_low": torch.ones(3, 1), "fold.b.log_scale": torch.zeros(4).half()}


def start() -> Start:
    task = zoo.task("llama", batches=1)
    task.start = LEARNED
    return Start(task)


def test_what_is_taken_is_a_copy_in_float32() -> None:
    begun = start()
    taken = begun.take("a.clip_low", (3, 1))
    assert taken is not None and torch.equal(taken, LEARNED["a.clip_low"])
    taken += 1
    assert torch.equal(LEARNED["a.clip_low"], torch.ones(3, 1))
    scale = begun.take("fold.b.log_scale", (4,))
    assert scale is not None and scale.dtype == torch.float32
    assert begun.take("c.clip_low", (3, 1)) is None and "c.clip_low" not in begun
    begun.check_used()


def test_another_shape_is_refused() -> None:
    message = r"^the earlier run learned a.clip_low with .*\[3, 1\], but .* need \[3, 2\]"
    with pytest.raises(ValueError, match=message):
        start().take("a.clip_low", (3, 2))


def test_what_is_not_used_is_named() -> None:
    begun = start()
    begun.take("a.clip_low", (3, 1))
    with pytest.raises(ValueError, match=r"^the earlier run learned fold.b.log_scale, which these"):
        begun.check_used()
