"""The processes that torchrun starts: what they exchange, over torch.distributed.

Tensors are sent as bytes and everything else as JSON; nothing is unpickled. If a process fails, it
leaves its sentence in the store that torchrun keeps, and all others end with the same sentence.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor, distributed

from lowbit.ranks import ALONE, Ranks

SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LONGEST = timedelta(hours=4)  # that one process may compute while the others wait for it
POLL = 0.5  # seconds between two looks at the store
GRACE = 5.0  # seconds that the others have to notice the end of one
ERROR, ENDED = "error", "ended"
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

Kind = tuple[tuple[int, ...], torch.dtype]  # of a tensor: its shape and dtype

_stores: list[distributed.Store] = []  # the one of this process, once there is one
_runs = count()


class Lost(ValueError):
    """Another process has ended without a word."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended: run the same command again, with any number "
            "of processes; finished blocks are kept"
        )


def count_from_environment() -> int:
    """Returns how many processes torchrun has started; 1 without torchrun."""
    if not all(name in os.environ for name in SET_BY_TORCHRUN):
        return 1
    return int(os.environ["WORLD_SIZE"])


def index_from_environment() -> int:
    """Returns the number of this process, from 0."""
    return int(os.environ["RANK"]) if count_from_environment() > 1 else 0


def own_device(name: str) -> str:
    """Returns the device of this process: where torchrun started several on a machine, each has
    a GPU of its own.

    name: as it was given; "auto" or a type such as "cuda" stands for that GPU.
    """
    gpus = torch.accelerator.is_available() and count_from_environment() > 1
    if not gpus or name not in ("auto", "cuda", "xpu"):
        return name
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return f"{kind.type}:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def joined() -> Iterator[Ranks]:
    """Context manager: joins the processes that torchrun started; yields ALONE without torchrun.

    An error in one process ends all of them with the sentence of the first.
    """
    if count_from_environment() == 1:
        yield ALONE
        return
    together = Together()
    try:
        yield together
        together.close()
    except BaseException as error:
        first = together.end(error)
        if first is error:
            raise
        raise first from error


class Together(Ranks):
    """One of several processes."""

    def __init__(self) -> None:
        self.index, self.count = index_from_environment(), count_from_environment()
        if not _stores:
            store, *_ = next(distributed.rendezvous("env://", self.index, self.count))
            _stores.append(store)
        run = next(_runs)  # the same number in all processes
        self.store = distributed.PrefixStore(f"lowbit/{run}", _stores[0])
        backend, local = "gloo", int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(local)  # NCCL expects a GPU of its own in each process
        with _words():
            distributed.init_process_group(
                backend,
                store=distributed.PrefixStore("group", self.store),
                rank=self.index,
                world_size=self.count,
                timeout=LONGEST,
            )
        self.watch = _Watch(self.store)
        self.watch.start()

    def every(self, value: Any) -> list[Any]:
        text = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with _words():
            distributed.all_gather(sizes, torch.tensor([len(text)]))
            most = max(int(size) for size in sizes)
            own = torch.frombuffer(bytearray(text.ljust(most)), dtype=torch.uint8)
            texts = [torch.empty(most, dtype=torch.uint8) for _ in range(self.count)]
            distributed.all_gather(texts, own)
        return [json.loads(bytes(each.numpy())) for each in texts]

    def value(self, make: Callable[[], Any], source: int = 0) -> Any:
        return self.every(make() if self.index == source else None)[source]

    def tensors(
        self, make: Callable[[], Mapping[str, Tensor]], source: int = 0
    ) -> Mapping[str, Tensor]:
        own = {n: t.detach().cpu() for n, t in make().items()} if self.index == source else {}
        kinds = self.value(
            lambda: [[n, list(t.shape), str(t.dtype)] for n, t in own.items()], source
        )
        message = _message(list(own.values())) if own else None
        shapes = [(tuple(shape), DTYPES[dtype]) for _, shape, dtype in kinds]
        if message is None:
            message = torch.empty(_size(shapes), dtype=torch.uint8)
        self.fill(message, source)
        if self.index == source:
            return own
        return dict(zip((name for name, *_ in kinds), _parts(message, shapes), strict=True))

    def lists(
        self,
        own: Sequence[Tensor],
        device: torch.device,
        receivers: Sequence[Sequence[int | None]],
    ) -> list[Sequence[Tensor | None]]:
        stated = self.every([[list(tensor.shape), str(tensor.dtype)] for tensor in own])
        kinds = [[(tuple(shape), DTYPES[dtype]) for shape, dtype in each] for each in stated]
        found: list[list[Tensor | None]] = [[None] * len(each) for each in kinds]
        others = [rank for rank in range(self.count) if rank != self.index]

        def places(source: int, receiver: int) -> list[int]:
            """Returns which tensors of one process another one receives."""
            chosen = receivers[source] if source < len(receivers) else []
            every = range(len(kinds[source]))
            return [i for i in every if not chosen or chosen[i] in (receiver, None)]

        for place in places(self.index, self.index):
            found[self.index][place] = own[place]
        sent = {o: _message([own[i] for i in places(self.index, o)]) for o in others}
        arriving = {o: [kinds[o][i] for i in places(o, self.index)] for o in others}
        messages = {
            o: torch.empty(_size(each), dtype=torch.uint8, device=device)
            for o, each in arriving.items()
        }
        jobs = [distributed.P2POp(distributed.isend, m, o) for o, m in sent.items() if len(m)]
        jobs += [distributed.P2POp(distributed.irecv, m, o) for o, m in messages.items() if len(m)]
        with _words():
            for work in distributed.batch_isend_irecv(jobs) if jobs else ():
                work.wait()
        for other, message in messages.items():
            parts = _parts(message, arriving[other])
            for place, tensor in zip(places(other, self.index), parts, strict=True):
                found[other][place] = tensor
        return [*found]

    def fill(self, tensor: Tensor, source: int) -> None:
        if tensor.numel():
            with _words():
                distributed.broadcast(tensor.view(-1).view(torch.uint8), source)

    def close(self) -> None:
        """Leaves the group, once every process has come here."""
        self.every(None)
        distributed.destroy_process_group()
        self.watch.stop()

    def end(self, error: BaseException) -> BaseException:
        """Tells the others of an error, and waits until they know; returns the first one's."""
        first = sentence = str(error) or type(error).__name__
        self.watch.stop()
        try:
            first = self.store.compare_set(ERROR, "", sentence).decode()
            distributed.destroy_process_group()  # wakes those that wait for this process
            ended, until = self.store.add(ENDED, 1), time.monotonic() + GRACE
            while ended < self.count and time.monotonic() < until:
                time.sleep(POLL / 5)
                ended = self.store.add(ENDED, 0)
        except RuntimeError:
            pass  # the process that keeps the store has ended
        return error if first == sentence else ValueError(first)


class _Watch(Thread):
    """Ends the process if another one has failed while this one computes on."""

    def __init__(self, store: distributed.Store) -> None:
        super().__init__(daemon=True)
        self.store = store
        self._stopped = Event()

    def run(self) -> None:
        failed: float | None = None
        while not self._stopped.wait(POLL):
            try:
                failed = failed or (time.monotonic() if self.store.check([ERROR]) else None)
            except RuntimeError:
                return
            if failed is not None and time.monotonic() - failed > GRACE:
                sentence = self.store.get(ERROR).decode()
                sys.stderr.write(f"error: {sentence}\n")
                sys.stderr.flush()
                os._exit(1)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


@contextmanager
def _words() -> Iterator[None]:
    """Turns the errors of a connection that breaks into one sentence."""
    try:
        yield
    except RuntimeError as error:
        raise Lost from error


def _message(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the bytes of tensors as one tensor."""
    parts = [t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _size(kinds: Sequence[Kind]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kinds)


def _parts(message: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    """Returns the tensors of a message, given their shapes and dtypes."""
    parts = zip(message.split([_size([kind]) for kind in kinds]), kinds, strict=True)
    return [part.clone().view(dtype).view(shape) for part, (shape, dtype) in parts]
