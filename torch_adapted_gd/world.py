"""The processes that train together: what they exchange, and how all of them learn that one has failed.

A `World` of one process returns everything at once, so that the rest of the package need not ask how many there are.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pickle
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process could not take the step, so that this one must not either."""


class World:
    """One process: rank 0 of 1.

    Attributes:
        rank: The number of this process.
        size: How many there are.
    """

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, with the same bits in each."""
        return tensor

    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        """The rows of all processes, one after the other.

        Args:
            rows: Those of this process.
            lengths: How many each process has.
        """
        return rows

    def same(self, value: T) -> T:
        """What process 0 has: a number, a tensor, or anything that is made of these."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return flag

    def objects(self, value: T) -> list[T]:
        """What each process has, by rank; tensors stay where they are."""
        return [value]

    def from_rank(self, value: T | None, rank: int) -> T:  # noqa: ARG002
        """What one process has."""
        assert value is not None
        return value

    def collected(self, value: T, rank: int) -> list[T]:  # noqa: ARG002
        """What each process has, in the process ``rank``; an empty list in all others."""
        return [value]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context in which an exception in one process raises a `PeerError` in all others, in their next exchange."""
        yield

    def agree(self) -> None:
        """Wait until all processes have come as far as this."""


ALONE = World()


class Processes(World):
    """The processes of a group of `torch.distributed`.

    Each exchange begins with a flag that says whether all processes are well. One that has failed sends the flag in
    `together`, so that the others do not wait for it.

    Args:
        group: Their group. Exchanges take place in groups of their own with the same processes, so that they can never be
            confused with those of DistributedDataParallel.
        device: Where tensors are.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._ranks = dist.get_process_group_ranks(group)
        self._timeout = _timeout_of(group)
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._control = self._new_group("gloo")
        self._data = self._control if backend == "gloo" else self._new_group(backend)
        self._device = device

    def _new_group(self, backend: str) -> dist.ProcessGroup:
        group = dist.new_group(self._ranks, self._timeout, backend, use_local_synchronization=True)
        return cast(dist.ProcessGroup, group)

    def sum(self, tensor: Tensor) -> Tensor:
        """See `World`."""
        self._meet()
        total = tensor.detach().to(self._device, copy=True).contiguous()
        dist.all_reduce(total, group=self._data)
        return total

    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """See `World`."""
        self._meet()
        most = max(1, *lengths)
        mine = rows.new_zeros(most, *rows.shape[1:], device=self._device)  # gloo takes equal sizes alone
        mine[: len(rows)] = rows
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self._data)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def same(self, value: T) -> T:
        """See `World`."""
        if isinstance(value, float):
            return self._meet(value if self.rank == 0 else 0.0)  # type: ignore[return-value]
        return self.from_rank(value, 0)

    def any(self, flag: bool) -> bool:
        """See `World`."""
        return any(self.objects(flag))

    def objects(self, value: T) -> list[T]:
        """See `World`."""
        self._meet()
        tensors, found = self._told(value)
        return [self._broadcast(skeleton, shapes, tensors, rank) for rank, (skeleton, shapes) in enumerate(found)]

    def from_rank(self, value: T | None, rank: int) -> T:
        """See `World`."""
        self._meet()
        mine, tensors = _apart(value if rank == self.rank else None)
        found = [(mine, [(t.shape, t.dtype) for t in tensors])]
        dist.broadcast_object_list(found, self._ranks[rank], group=self._control)
        return self._broadcast(*found[0], tensors, rank)  # type: ignore[no-any-return]

    def collected(self, value: T, rank: int) -> list[T]:
        """See `World`."""
        self._meet()
        tensors, found = self._told(value)
        if rank != self.rank:
            for tensor in tensors:
                dist.send(self._ready(tensor), self._ranks[rank], group=self._data)
            return []
        values = []
        for sender, (skeleton, shapes) in enumerate(found):
            if sender == rank:
                values.append(value)
                continue
            received = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in shapes]
            for tensor in received:
                dist.recv(tensor, self._ranks[sender], group=self._data)
            values.append(_joined(skeleton, received))
        return values

    def _told(self, value: Any) -> tuple[list[Tensor], list[Any]]:
        """The tensors of a value; and of each process's what is left without them, with their shapes and dtypes."""
        mine, tensors = _apart(value)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (mine, [(t.shape, t.dtype) for t in tensors]), group=self._control)
        return tensors, found

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device).contiguous()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """See `World`."""
        try:
            yield
        except PeerError:
            raise
        except BaseException as error:
            self._exchange_failure(error)
            raise

    def agree(self) -> None:
        """See `World`."""
        self._meet()

    def _meet(self, number: float = 0.0) -> float:
        """Make sure that all processes are well; returns the sum of a number of each.

        Raises:
            PeerError: One is not.
        """
        flag = torch.tensor([0.0, number], dtype=torch.float64)
        dist.all_reduce(flag, group=self._control)
        failed, total = flag.tolist()
        if failed:
            self._raise(self._failures(None))
        return float(total)

    def _exchange_failure(self, error: BaseException) -> None:
        dist.all_reduce(torch.tensor([1.0, 0.0], dtype=torch.float64), group=self._control)
        self._failures(f"{type(error).__name__}: {error}")

    def _failures(self, mine: str | None) -> list[str | None]:
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, mine, group=self._control)
        return found

    def _raise(self, failures: list[str | None]) -> None:
        rank, text = next((rank, text) for rank, text in enumerate(failures) if text is not None)
        raise PeerError(f"Process {rank} of {self.size} could not take the step, so no process changed anything. {text}")

    def _broadcast(self, skeleton: bytes, shapes: list[Any], tensors: list[Tensor], rank: int) -> Any:
        """What one process has, given what all know of it; ``tensors`` are those of this one."""
        received = []
        for number, (shape, dtype) in enumerate(shapes):
            mine = rank == self.rank
            tensor = self._ready(tensors[number]) if mine else torch.empty(shape, dtype=dtype, device=self._device)
            dist.broadcast(tensor, self._ranks[rank], group=self._data)
            received.append(tensor)
        return _joined(skeleton, received)


def _timeout_of(group: dist.ProcessGroup) -> datetime.timedelta | None:
    """How long the user lets exchanges in a group take, which others do not inherit; None for torch's default."""
    for device in group._device_types:
        with contextlib.suppress(RuntimeError):  # no backend for it
            if found := getattr(group._get_backend(device).options, "_timeout", None):
                return cast(datetime.timedelta, found)
    return None


_known: weakref.WeakKeyDictionary[dist.ProcessGroup, World] = weakref.WeakKeyDictionary()


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that train a model: those that DistributedDataParallel has it in, or else all."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group  # type: ignore[no-any-return, unused-ignore]
    return dist.group.WORLD


def world_of(group: dist.ProcessGroup | None, device: torch.device) -> World:
    """What a step is shared by.

    Args:
        group: The processes; None for one.
        device: Where parameters are.
    """
    if group is None or dist.get_world_size(group) <= 1:
        return ALONE
    if group not in _known:
        _known[group] = Processes(group, device)
    return _known[group]


def processes_on_this_machine() -> int:
    """How many processes share this machine's memory; where nobody says, all that train together."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told) if told.isdigit() else dist.get_world_size())


class _Pickler(pickle.Pickler):
    """Leaves tensors out, each once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[Any, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        key = (obj.data_ptr(), obj.shape, obj.stride(), obj.dtype)
        if key not in self._places:
            self._places[key] = len(self.tensors)
            self.tensors.append(obj)
        return self._places[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


def _apart(value: Any) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def _joined(skeleton: bytes, tensors: list[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(skeleton), tensors).load()
