"""One loss over all batches of a loader."""

from collections.abc import Iterable, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data.distributed import DistributedSampler


def full_loss(model: nn.Module, criterion: nn.Module, loader: Iterable[Any], device: torch.device) -> Tensor:
    """The criterion's loss of all batches at once, with its graph: one call of the model for each batch, see `full_batch`."""
    outputs, targets = [], []
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            what = f"{len(batch)} things" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
            raise TypeError(
                f"`loader` should give pairs of inputs and a tensor of targets, but gave {what}. Wrap it in a generator that "
                "makes pairs: ((batch['x'], batch['y']) for batch in loader)."
            )
        inputs, target = tree_map(lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t, tuple(batch))
        if isinstance(inputs, dict):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"`full_batch` needs a model that returns a tensor, but it returned a {type(output).__name__}. For others call "
                "the model batch by batch, the criterion once on what you stack, `backward` once, and `step`."
            )
        outputs.append(output)
        targets.append(target)
    if not outputs:
        raise ValueError(
            "`loader` should give at least one batch, but gave none. An iterator is used up by one step: pass the DataLoader."
        )
    loss: Tensor = criterion(torch.cat(outputs), torch.cat(targets))
    return loss


def repeated_samples(loader: Any) -> str | None:
    """The text of a warning for a loader that gives some samples to several processes; None for others."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    samples = len(cast(Sized, sampler.dataset))
    if sampler.total_size == samples:
        return None
    return (
        f"DistributedSampler gives {sampler.total_size - samples} of {samples} samples twice, so that all "
        f"{sampler.num_replicas} processes have the same number. Duplicate outputs make the kernel singular, and count twice "
        "in the loss. Use drop_last=True, or give each process a share of its own, of any size: "
        "Subset(dataset, range(rank, len(dataset), processes))."
    )
