"""A fixed set of samples to evaluate a network on; each process has a part of it, without duplicates."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .frameworks import CollapseConfigError, LightningModule, Trainer

Reference = str | Iterable[Any] | Callable[[Trainer, LightningModule], Iterable[Any]]


@contextmanager
def isolated_rng(*generators: torch.Generator) -> Iterator[None]:
    """Context that restores the random states of torch, NumPy, Python and these generators.

    Even an unshuffled pass over a DataLoader draws from torch's.
    """
    states: list[tuple[Callable[[Any], Any], Any]] = [(random.setstate, random.getstate())]
    states += [(generator.set_state, generator.get_state()) for generator in generators]
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        states.append((numpy_random.set_state, numpy_random.get_state()))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for restore, state in states:
                restore(state)


def seed_all(seed: int, *generators: torch.Generator) -> None:
    """Seed what `isolated_rng` restores."""
    for generator in (torch.default_generator, *generators):  # `torch.manual_seed` takes 2 ms to record its caller
        generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context in which a network is in evaluation mode, without gradients and without compiled code, so that hooks work."""
    modes = [(part, part.training) for part in module.modules()]
    dynamo = "torch._dynamo" in sys.modules
    with torch.no_grad(), torch.compiler.set_stance("force_eager") if dynamo else nullcontext():
        try:
            for part, _ in modes:
                part.training = False
            yield
        finally:
            for part, training in modes:
                part.training = training


class ReferenceSet:
    """Batches that are the same in each pass, and the generators that they draw from.

    ``share`` is rank and number of processes; each process takes its share of the first ``limit`` batches.
    """

    def __init__(self, batches: Iterable[Any], share: tuple[int, int] = (0, 1), limit: int | None = None) -> None:
        self._batches = batches
        self._rank, self._world = share
        self._limit = limit
        sampler, batch_sampler = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
        holders = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        found = (getattr(holder, "generator", None) for holder in holders)
        self.generators = {generator for generator in found if isinstance(generator, torch.Generator)}

    def __iter__(self) -> Iterator[Any]:
        """The batches of this process, from the same random numbers each time; use it within `isolated_rng`."""
        seed_all(0, *self.generators)
        yield from islice(self._batches, self._rank, self._limit, self._world)

    def __len__(self) -> int:
        """The number of batches of this process; a TypeError if the loader does not know it."""
        return len(range(len(self._batches))[self._rank : self._limit : self._world])  # type: ignore[arg-type]

    @classmethod
    def of(cls, reference: Reference, trainer: Trainer, module: LightningModule, limit: int | None) -> "ReferenceSet":
        """The batches that a user named, at most ``limit`` in all processes together: see `CollapseMonitor`."""
        share, limit = (trainer.global_rank, trainer.world_size), 1 if trainer.fast_dev_run else limit  # type: ignore[attr-defined]
        with isolated_rng():
            if isinstance(reference, str):
                return cls(_in_order(reference, _loader_of(reference, trainer), trainer, *share, limit))
            given = reference(trainer, module) if callable(reference) else reference
        if not isinstance(given, Iterable):
            raise CollapseConfigError(f"`reference` should give batches to iterate over, but gave {type(given).__name__}.")
        if isinstance(given, Iterator):
            raise CollapseConfigError(
                "`reference` should give a loader or a list of batches, for one pass in each evaluation, but gave an iterator, "
                f"{type(given).__name__}."
            )
        return cls(given, share, limit)


def _unfit(name: str, problem: str) -> CollapseConfigError:
    return CollapseConfigError(
        f'`reference` is "{name}", but {problem}. Pass a DataLoader or a list of batches with the samples to evaluate on.'
    )


def _loader_of(reference: str, trainer: Trainer) -> DataLoader[Any]:
    if reference == "val" and trainer.val_dataloaders is None:  # Lightning makes them in the first epoch that validates
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
    found = trainer.train_dataloader if reference == "train" else trainer.val_dataloaders
    if isinstance(found, Sequence) and len(found) == 1:
        found = found[0]
    if found is None:
        raise _unfit(reference, "the trainer has no such loader")
    if not isinstance(found, DataLoader):
        raise _unfit(reference, f"that is a {type(found).__name__} and not one torch DataLoader")
    return found


def _in_order(
    name: str, loader: DataLoader[Any], trainer: Trainer, rank: int, world: int, limit: int | None
) -> DataLoader[Any]:
    """A loader of this process's part of the samples of a loader, all of them in the order of the dataset, up to the limit."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise _unfit(name, f"its dataset {type(dataset).__name__} has no fixed order")
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        raise _unfit(name, "its loader has batches but no batch size")
    indices = _indices(name, loader)
    if name == "train" and trainer.overfit_batches:  # type: ignore[attr-defined]
        indices = indices[: int(trainer.num_training_batches) * size * world]
    if limit is not None:
        indices = indices[: limit * size]
    if indices:
        _check_fixed(name, dataset, loader.collate_fn, indices)
    return DataLoader(
        Subset(dataset, indices[rank::world]),
        batch_size=size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _indices(name: str, loader: DataLoader[Any]) -> Sequence[int]:
    sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    # For several processes Lightning wraps the user's sampler if it does not know its type.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return sorted(int(i) for i in sampler.indices)
    if isinstance(sampler, WeightedRandomSampler):
        return [int(i) for i in torch.as_tensor(sampler.weights).nonzero().flatten()]
    if isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler):
        return range(len(loader.dataset))  # type: ignore[arg-type]
    raise _unfit(name, f"its loader draws samples by a {type(sampler).__name__}, so it is unknown which to evaluate")


def _check_fixed(name: str, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], indices: Sequence[int]) -> None:
    """Refuse random augmentation: fetch a few samples several times with different seeds, and compare."""
    for index in sorted({indices[0], indices[len(indices) // 2], indices[-1]}):
        fetched = []
        for seed in range(8):
            seed_all(seed)
            fetched.append(tree_flatten(collate([dataset[index]]))[0])
        if not all(_same(a, b) for other in fetched[1:] for a, b in zip(fetched[0], other, strict=True)):
            raise _unfit(name, f"sample {index} of its dataset changes each time it is fetched (random augmentation?)")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=a.is_floating_point()))
    return isinstance(a, Tensor) == isinstance(b, Tensor)  # other values are not compared
