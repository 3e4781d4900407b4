"""What several of the models are made of."""

import itertools

import torch
from torch import nn


def param(*shape):
    return nn.Parameter(torch.randn(*shape))


def tanh_net(*sizes):
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])
