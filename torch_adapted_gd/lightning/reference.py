"""A fixed set of samples to evaluate a network on, shared out among processes without doubles."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
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
def isolated_rng() -> Iterator[None]:
    """Context in which random numbers of torch, NumPy and Python may be drawn: their streams are put back, whatever happens.

    Even an unshuffled pass through a DataLoader draws from torch's.
    """
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


def seed_all(seed: int) -> None:
    """Seed what `isolated_rng` puts back."""
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes two milliseconds to note who called it
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context in which a network is evaluated and nothing else happens to it.

    All submodules are in evaluation mode, no gradient is recorded and compiled parts run uncompiled (hooks would not be seen);
    afterwards everything is as it was.
    """
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
    """Batches that are the same in every evaluation.

    Args:
        batches: What to iterate over.
        share: This process's batches: each ``world``-th from ``rank`` on. ``(0, 1)`` where samples are shared out already.
        limit: At most so many batches in all processes together, or None.
    """

    def __init__(self, batches: Iterable[Any], share: tuple[int, int] = (0, 1), limit: int | None = None) -> None:
        self._batches = batches
        self._rank, self._world = share
        self._limit = limit
        self._states: list[tuple[torch.Generator, Tensor]] = []

    def __iter__(self) -> Iterator[Any]:
        """The batches of this process: within `replayed`, the same each time."""
        seed_all(0)
        for generator, state in self._states:
            generator.set_state(state)
        yield from islice(self._batches, self._rank, self._limit, self._world)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Context in which each pass draws the same random numbers; generators of the loader's own are put back."""
        with isolated_rng():
            self._states = [(generator, generator.get_state()) for generator in _generators(self._batches)]
            try:
                yield
            finally:
                for generator, state in self._states:
                    generator.set_state(state)
                self._states = []

    @property
    def num_batches(self) -> int | None:
        """How many batches this process has; None if the loader does not say."""
        if not isinstance(self._batches, Sized):
            return None
        total = len(self._batches) if self._limit is None else min(len(self._batches), self._limit)
        return len(range(self._rank, total, self._world))

    @classmethod
    def of(cls, reference: Reference, trainer: Trainer, module: LightningModule, limit: int | None) -> "ReferenceSet":
        """Set up what a user named.

        Args:
            reference: ``"train"`` or ``"val"``, the dataset of that loader, in order, whole, with its collation; a loader or a
                function of trainer and module that gives one, whose batches are taken as they come.
            trainer: Lightning's.
            module: The user's.
            limit: At most so many batches, or None.

        Raises:
            CollapseConfigError: There is no such loader, or its samples are not the same each time.
        """
        rank, world = trainer.global_rank, trainer.world_size
        if isinstance(reference, str):
            loader = _loader_of(reference, trainer)
            with isolated_rng():
                return cls(_in_order(reference, loader, trainer, rank, world, limit))
        with isolated_rng():
            given = reference(trainer, module) if callable(reference) else reference
        if not isinstance(given, Iterable):
            raise CollapseConfigError(f"`reference` should give batches to iterate over, but gave {type(given).__name__}.")
        if isinstance(given, Iterator):
            raise CollapseConfigError(
                "`reference` should give what can be iterated over in each evaluation, a loader or a list of batches, but gave "
                f"an iterator, {type(given).__name__}."
            )
        return cls(given, (rank, world), limit)


def _generators(batches: Any) -> list[torch.Generator]:
    sampler, batch_sampler = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    holders = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for g in (getattr(holder, "generator", None) for holder in holders) if isinstance(g, torch.Generator)}
    return list(found.values())


def _loader_of(reference: str, trainer: Trainer) -> DataLoader[Any]:
    if reference == "val" and trainer.val_dataloaders is None:  # Lightning waits for the first epoch that validates
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
    found = trainer.train_dataloader if reference == "train" else trainer.val_dataloaders
    if isinstance(found, Sequence) and len(found) == 1:
        found = found[0]
    if found is None:
        raise CollapseConfigError(f'`reference` is "{reference}", but the trainer has no such loader. Give it a DataLoader.')
    if not isinstance(found, DataLoader):
        raise CollapseConfigError(
            f'`reference` is "{reference}", but that is a {type(found).__name__} and not one torch DataLoader. Give it the '
            "DataLoader to evaluate on."
        )
    return found


def _in_order(
    name: str, loader: DataLoader[Any], trainer: Trainer, rank: int, world: int, limit: int | None
) -> DataLoader[Any]:
    """The samples of a loader in the order of its dataset, none left out, up to the limit; those of this process."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise CollapseConfigError(
            f'`reference` is "{name}", whose dataset {type(dataset).__name__} has no fixed order. Give it a DataLoader or a '
            "list of batches to evaluate on."
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        raise CollapseConfigError(
            f'`reference` is "{name}", whose loader has batches but no batch size. Give it a DataLoader to evaluate on.'
        )
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
    # For several processes Lightning wraps a sampler of the user's that it does not know.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return sorted(int(i) for i in sampler.indices)
    if isinstance(sampler, WeightedRandomSampler):
        return [int(i) for i in torch.as_tensor(sampler.weights).nonzero().flatten()]
    if isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler):
        return range(len(loader.dataset))  # type: ignore[arg-type]
    raise CollapseConfigError(
        f'`reference` is "{name}", whose loader draws samples by a {type(sampler).__name__}: which of them should be '
        "evaluated? Give it a DataLoader."
    )


def _check_fixed(name: str, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], indices: Sequence[int]) -> None:
    """Fetch a few samples several times with other random numbers: augmentation would show, be it a coin that is thrown."""
    for index in sorted({indices[0], indices[len(indices) // 2], indices[-1]}):
        fetched = []
        for seed in range(8):
            seed_all(seed)
            fetched.append(tree_flatten(collate([dataset[index]]))[0])
        if not all(_same(a, b) for other in fetched[1:] for a, b in zip(fetched[0], other, strict=True)):
            raise CollapseConfigError(
                f'`reference` is "{name}", but sample {index} of its dataset is another each time it is fetched (random '
                "augmentation?). Give it a DataLoader over the samples without augmentation."
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=a.is_floating_point()))
    return isinstance(a, Tensor) == isinstance(b, Tensor)  # other things are no numbers to compare
