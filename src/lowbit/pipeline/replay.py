"""Makes a folder again from the float model and from what an earlier run learned.

No calibration text is read. This works for methods whose codes follow from the weights and the
learned parameters alone; `Method.why_no_replay` says why others cannot.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.blocks import BlockTask
from lowbit.calibration import Calibration, TokenWindows
from lowbit.checkpoint.learned import Learned
from lowbit.methods import Method
from lowbit.methods.result import BlockResult
from lowbit.pipeline.job import Job
from lowbit.pipeline.options import RunOptions
from lowbit.pipeline.published import Published


class Replay(Job):
    """A job that makes a folder again.

    model: a folder or a hub id.
    method: the method of the earlier run.
    options: its options; `start_from` is the folder of what it learned.
    text: what config.json states of its calibration text.
    seed: its seed.
    check_model: called with the hash of the model before what was learned is read.

    Raises ValueError if the method cannot be replayed, or as `Job` and `check_model` do.
    """

    def __init__(
        self,
        model: str | Path,
        method: Method,
        options: RunOptions,
        text: dict[str, Any] | None,
        seed: int = 0,
        check_model: Callable[[str], None] = lambda sha256: None,
    ) -> None:
        reason = method.why_no_replay()
        if reason is not None:
            raise ValueError(
                f"{method.name} {reason}: only omniquant and matquant with rounding: nearest, and "
                "ptq161 with init: reference and match: self, can be replayed"
            )
        self.check_model = check_model
        super().__init__(model, method, Calibration(seed=seed), options)
        self.text = text

    def _earlier_run(self) -> Learned | Published | None:
        self.check_model(self.model_hash)
        return super()._earlier_run()

    def windows(self) -> None:
        return None

    def text_facts(self, windows: TokenWindows | None) -> dict[str, Any] | None:
        return self.text

    def signature(self, windows: TokenWindows | None) -> dict[str, Any]:
        return {**super().signature(None), "calibration": self.text and self.text.get("digest")}

    def made(self, task: BlockTask, method: Method) -> BlockResult:
        result = method.replay(task)
        result.report = result.report.without_text()
        return result
