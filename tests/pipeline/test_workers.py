"""Several workers write one folder: the bytes of one process, also where a worker is killed."""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import quantized
from forked import forked, result_of

from lowbit.checkpoint.claims import CLAIMS, Claims, refuse_local_locks
from lowbit.events import BlockStarted, Event
from lowbit.methods import GPTQ, RTN, Method, MixedQuant, OmniQuant, QuIP, Trellis

pytestmark = pytest.mark.slow

SELF = QuIP(match="self", min_tokens=8, finetune_epochs=1)
OPTIONS: dict[str, tuple[Method, dict[str, Any]]] = {
    "rtn": (RTN(bits=4, group_size=16), {"lm_head_bits": 8, "embedding_bits": 8}),
    "quip": (SELF, {"skip": ("layers.0.*",), "streams": "disk"}),
}


def work(out: Path, name: str, **more: Any) -> Path:
    method, options = OPTIONS[name]
    return quantized.quantize(quantized.source(), out, method, worker=True, **options, **more)


def kill(event: Event) -> None:
    """Ends its process without a word as soon as a block starts."""
    if isinstance(event, BlockStarted):
        os.kill(os.getpid(), signal.SIGKILL)


def shards(out: Path) -> dict[str, bytes]:
    """The content of OUT without what differs: the times in run/ and its locks."""
    kept = quantized.contents(out).items()
    return {name: data for name, data in kept if not name.startswith("run/claims")}


EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture(scope="module", params=["rtn", pytest.param("quip", marks=EXHAUSTIVE)])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a run, and what one process makes of it."""
    method, options = OPTIONS[request.param]
    out = tmp_path_factory.mktemp(request.param) / "out"
    return request.param, shards(quantized.quantize(quantized.source(), out, method, **options))


@pytest.mark.parametrize("count", [1, 3])
def test_workers_make_what_one_process_makes(count: int, alone: Any, tmp_path: Path) -> None:
    name, wanted = alone

    def worker() -> list[int]:
        seen: list[Event] = []
        work(tmp_path / "out", name, on_event=seen.append)
        return [event.index for event in seen if isinstance(event, BlockStarted)]

    found = [result_of(each)["result"] for each in [forked(worker) for _ in range(count)]]
    assert sorted(sum(found, [])) == [0, 1]
    assert shards(tmp_path / "out") == wanted
    lines = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").open()]
    kinds = [line["kind"] for line in lines]
    assert kinds.count("run") == count and kinds.count("finished") == 2 and kinds[-1] == "done"
    assert not (tmp_path / "out" / "run" / "events").exists()
    assert not (tmp_path / "out" / "run" / "streams").exists()


@pytest.mark.parametrize("worker", [True, False], ids=["by a worker", "by one process"])
def test_what_a_killed_worker_leaves_is_continued(worker: bool, alone: Any, tmp_path: Path) -> None:
    name, wanted = alone
    out = tmp_path / "out"
    killed = [forked(lambda: work(out, name, on_event=kill)) for _ in range(2)]
    assert [result_of(each) for each in killed] == [{"signal": signal.SIGKILL}] * 2
    assert not (out / "config.json").exists()
    method, options = OPTIONS[name]
    quantized.quantize(quantized.source(), out, method, worker=worker, **options)
    assert shards(out) == wanted
    assert not (out / "run" / "events").exists()


def test_the_claim_of_a_dead_worker_is_free(tmp_path: Path) -> None:
    """A worker waits for a block that another one makes, and makes it if that one dies."""
    out = tmp_path / "out"
    reader, writer = os.pipe()

    def wait(event: Event) -> None:
        if isinstance(event, BlockStarted) and event.index == 0:
            os.write(writer, b"x")
            signal.pause()

    first = forked(lambda: work(out, "rtn", on_event=wait))
    os.read(reader, 1)
    seen: list[Event] = []
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(work, out, "rtn", on_event=seen.append)
        while not any(event.kind == "finished" for event in seen):  # block 1
            assert not second.done()
            time.sleep(0.05)
        assert not second.done()
        os.kill(first[0], signal.SIGKILL)
        result_of(first)
        second.result()
    assert [e.index for e in seen if isinstance(e, BlockStarted)] == [1, 0]


REFUSED: dict[str, tuple[Method, dict[str, Any], str]] = {
    "feedback": (GPTQ(), {}, "the blocks of gptq with these settings, since a block reads what"),
    "match": (
        Trellis(),
        {},
        "set match to self, or run it in one process, or several with torchrun",
    ),
    "learned": (OmniQuant(), {}, "the blocks of omniquant"),
    "statistics": (MixedQuant(), {}, "the blocks of mixedquant"),
    "gradients": (
        QuIP(match="self", output_feedback=True),
        {},
        "with output_feedback, which passes",
    ),
    "restart": (RTN(), {"restart": True}, "leave out --restart"),
    "budget": (RTN(), {"budget": 3.5}, "lowbit mix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_workers_cannot_share(name: str, tmp_path: Path) -> None:
    method, options, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        quantized.quantize(quantized.source(), tmp_path / "out", method, worker=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_run_of_one_process_keeps_workers_out(tmp_path: Path) -> None:
    errors: list[str] = []

    def also(**options: Any) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            if isinstance(event, BlockStarted) and event.index == 0:
                with pytest.raises(ValueError, match="another process is writing") as error:
                    method, more = OPTIONS["rtn"]
                    quantized.quantize(
                        quantized.source(), tmp_path / "out", method, **more, **options
                    )
                errors.append(str(error.value))

        return on_event

    method, options = OPTIONS["rtn"]
    quantized.quantize(
        quantized.source(), tmp_path / "out", method, **options, on_event=also(worker=True)
    )
    work(tmp_path / "out", "rtn")  # it is complete
    for path in [*(tmp_path / "out" / "run").glob("model-*"), tmp_path / "out" / "config.json"]:
        path.unlink()
    work(tmp_path / "out", "rtn", on_event=also())
    assert len(errors) == 2


def test_another_processor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    result_of(forked(lambda: work(out, "rtn", on_event=kill)))
    monkeypatch.setattr("lowbit.pipeline.workers.processor", lambda device: "NVIDIA H200")
    with pytest.raises(ValueError, match="and this one would on NVIDIA H200"):
        work(out, "rtn")


MOUNTS = "/dev/sda / ext4 rw 0 0\nserver:/a /data nfs4 rw,{} 0 0\nserver:/b /data/own nfs rw 0 0\n"
PLACES = {"/data/out": "nolock", "/data": "vers=3,local_lock=all", "/data/x/y": "local_lock=flock"}


@pytest.mark.parametrize("place", PLACES)
def test_locks_that_other_machines_do_not_see(place: str) -> None:
    with pytest.raises(ValueError, match="/data is mounted without locks"):
        refuse_local_locks(Path(place), MOUNTS.format(PLACES[place]))
    for fine in ("/data/own/out", "/datax", "/"):
        refuse_local_locks(Path(fine), MOUNTS.format(PLACES[place]))
    refuse_local_locks(Path(place), MOUNTS.format("local_lock=none"))


def test_claims(tmp_path: Path) -> None:
    first, second = (Claims(tmp_path / CLAIMS) for _ in range(2))
    assert first.take(3) and not second.take(3) and second.take(4)
    first.close()
    assert second.take(3)
