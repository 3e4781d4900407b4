"""What an installed wheel has to do: import no more than torch, train a small network, and give its kernel."""

import platform
import sys
from pathlib import Path

import torch
from torch import nn

before = set(sys.modules)
import torch_adapted_gd  # noqa: E402
from torch_adapted_gd import AdaptedGD, ntk  # noqa: E402

imported = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = imported & {"lightning", "matplotlib", "mlxtend", "pytorch_lightning", "scipy", "torchdiffeq", "torchmetrics", "tqdm"}
assert not heavy, heavy
assert Path(sys.prefix) in Path(torch_adapted_gd.__file__).parents, torch_adapted_gd.__file__

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
x, y = torch.randn(12, 4), torch.randn(12, 2)
criterion = nn.MSELoss()
optimizer = AdaptedGD(model, criterion=criterion)
losses = []
for _ in range(10):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 1e-3 * losses[0], losses
assert optimizer.last_step is not None
assert ntk(model, x).shape == (12, 2, 12, 2)
print(
    f"torch_adapted_gd {torch_adapted_gd.__version__}, torch {torch.__version__}, Python {platform.python_version()}: "
    f"loss {losses[0]:.2g} to {losses[-1]:.2g} in {len(losses)} steps, {optimizer.last_step.status}"
)
