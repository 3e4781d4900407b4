"""The processes that train together: what they exchange, and how all of them learn that one has failed.

A `World` of one process returns at once, so the rest of the package need not ask how many there are.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pickle
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process could not take the step, so this one must not either."""


class World:
    """One process: ``rank`` 0 of ``size`` 1."""

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, with the same bits in each."""
        return tensor

    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        """The rows of all processes, one after the other; each has as many as ``lengths`` says."""
        return rows

    def same(self, value: T) -> T:
        """The value of process 0: a number, a tensor, or anything that is made of these."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return any(self.objects(flag))

    def objects(self, value: T) -> list[T]:
        """The values of all processes, by rank; tensors in them stay on their device."""
        return [value]

    def from_rank(self, value: T | None, rank: int) -> T:  # noqa: ARG002
        """The value of one process."""
        assert value is not None
        return value

    def collected(self, value: T, rank: int) -> list[T]:  # noqa: ARG002
        """The values of all processes, in the process ``rank`` alone; an empty list in the others."""
        return [value]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context in which an exception in one process raises a `PeerError` in all others, in their next exchange."""
        yield

    def agree(self) -> None:
        """Wait until all processes are here."""


ALONE = World()


class Processes(World):
    """The processes of a group of `torch.distributed`.

    Each exchange begins with a flag that says whether all processes are well. One that has failed sends the flag in
    `together`, so that the others do not wait for it.

    Args:
        group: Their group. Exchanges take place in new groups of the same processes, so that they cannot be confused with
            those of DistributedDataParallel.
        device: Where the parameters are. Tensors are exchanged there if the group has NCCL for it, as each process needs a GPU
            of its own for that; else they go by the CPU, through gloo.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._ranks, self._home = dist.get_process_group_ranks(group), device
        timeout = _timeout_of(group)

        def new_group(backend: str) -> dist.ProcessGroup:
            made = dist.new_group(self._ranks, timeout, backend, use_local_synchronization=True)
            return cast(dist.ProcessGroup, made)

        self._control = new_group("gloo")
        by_nccl = device.type == "cuda" and "cuda:nccl" in dist.get_backend_config(group)
        self._data, self._device = (new_group("nccl"), device) if by_nccl else (self._control, torch.device("cpu"))

    def sum(self, tensor: Tensor) -> Tensor:
        self.agree()
        total = tensor.detach().to(self._device, copy=True).contiguous()
        dist.all_reduce(total, group=self._data)
        return total.to(self._home)

    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        self.agree()
        mine = rows.new_zeros(max(1, *lengths), *rows.shape[1:], device=self._device)  # gloo takes equal sizes alone
        mine[: len(rows)] = rows
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self._data)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(self._home)

    def same(self, value: T) -> T:
        if isinstance(value, float):
            return self._sum_of_numbers(value if self.rank == 0 else 0.0)  # type: ignore[return-value]
        return self.from_rank(value, 0)

    def objects(self, value: T) -> list[T]:
        tensors, found = self._described(value)
        return [self._broadcast(described, tensors, rank) for rank, described in enumerate(found)]

    def from_rank(self, value: T | None, rank: int) -> T:
        tensors, found = self._described(value if rank == self.rank else None)
        return self._broadcast(found[rank], tensors, rank)  # type: ignore[no-any-return]

    def collected(self, value: T, rank: int) -> list[T]:
        tensors, found = self._described(value)
        if rank != self.rank:
            for tensor in tensors:
                dist.send(self._ready(tensor), self._ranks[rank], group=self._data)
            return []
        values = []
        for sender, described in enumerate(found):
            if sender == rank:
                values.append(value)
                continue
            received = described.empty(self._device)
            for tensor in received:
                dist.recv(tensor, self._ranks[sender], group=self._data)
            values.append(described.filled([tensor.to(self._home) for tensor in received]))
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except PeerError:
            raise
        except BaseException as error:
            dist.all_reduce(torch.tensor([1.0, 0.0], dtype=torch.float64), group=self._control)
            self._failures(f"{type(error).__name__}: {error}")
            raise

    def agree(self) -> None:
        self._sum_of_numbers(0.0)

    def _sum_of_numbers(self, number: float) -> float:
        """The sum of a number over processes, after making sure that all are well.

        Raises:
            PeerError: One is not.
        """
        flag = torch.tensor([0.0, number], dtype=torch.float64)
        dist.all_reduce(flag, group=self._control)
        failed, total = flag.tolist()
        if failed:
            rank, text = next((rank, text) for rank, text in enumerate(self._failures(None)) if text is not None)
            raise PeerError(f"Process {rank} of {self.size} could not take the step, so no process changed anything. {text}")
        return float(total)

    def _failures(self, mine: str | None) -> list[str | None]:
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, mine, group=self._control)
        return found

    def _described(self, value: Any) -> tuple[list[Tensor], list[_Described]]:
        """The tensors of a value, and the description of each process's value."""
        self.agree()
        pickler = _Pickler(io.BytesIO())
        pickler.dump(value)
        shapes = [(t.shape, t.dtype) for t in pickler.tensors]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, _Described(pickler.file.getvalue(), shapes), group=self._control)
        return pickler.tensors, found

    def _broadcast(self, described: _Described, tensors: list[Tensor], rank: int) -> Any:
        """The value of one process, known by its description; ``tensors`` are those of this process."""
        mine = rank == self.rank
        received = [self._ready(tensor) for tensor in tensors] if mine else described.empty(self._device)
        for tensor in received:
            dist.broadcast(tensor, self._ranks[rank], group=self._data)
        return described.filled([tensor.to(self._home) for tensor in received])

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device).contiguous()


def _timeout_of(group: dist.ProcessGroup) -> datetime.timedelta | None:
    """The user's timeout for exchanges in a group, which new groups do not inherit; None for torch's default."""
    for device in group._device_types:
        with contextlib.suppress(RuntimeError):  # no backend for it
            if found := getattr(group._get_backend(device).options, "_timeout", None):
                return cast(datetime.timedelta, found)
    return None


_known: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, World]] = weakref.WeakKeyDictionary()


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that train a model: those of its DistributedDataParallel, or else all."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group  # type: ignore[no-any-return, unused-ignore]
    return dist.group.WORLD


def world_of(group: dist.ProcessGroup | None, device: torch.device) -> World:
    """The processes of a group, whose parameters are on ``device``; `ALONE` for None."""
    if group is None or dist.get_world_size(group) <= 1:
        return ALONE
    known = _known.setdefault(group, {})
    if device not in known:
        known[device] = Processes(group, device)
    return known[device]


def processes_on_this_machine() -> int:
    """How many processes share this machine's memory; if it is unknown, all that train together."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(local) if local.isdigit() else dist.get_world_size())


class _Pickler(pickle.Pickler):
    """Leaves tensors out and lists them, each once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.file, self.tensors = file, list[Tensor]()
        self._places: dict[Any, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        place = self._places.setdefault((obj.data_ptr(), obj.shape, obj.stride(), obj.dtype), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(obj)
        return place


class _Unpickler(pickle.Unpickler):
    """Puts tensors in again."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


@dataclass(frozen=True)
class _Described:
    """A value without its tensors, and the shapes and dtypes of these: small enough to be sent as an object."""

    packed: bytes
    shapes: list[tuple[torch.Size, torch.dtype]]

    def empty(self, device: torch.device) -> list[Tensor]:
        """Memory for the tensors."""
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.shapes]

    def filled(self, tensors: list[Tensor]) -> Any:
        """The value with its tensors."""
        return _Unpickler(io.BytesIO(self.packed), tensors).load()
