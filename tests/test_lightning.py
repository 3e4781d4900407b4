"""Lightning's automatic optimization: forward, zero_grad, backward, all inside the closure of one step."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_adapted_gd import AdaptedGD, AdaptedWarning, LinearInterpolationLR

from .cases import flat, mlp
from .lightning_cases import new_trainer

pl = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("default", "ignore:Damped steps leave the straight line")
MSE = nn.MSELoss()


class Regression(pl.LightningModule):
    def __init__(self, whole, options=None):
        super().__init__()
        torch.manual_seed(7)
        self.net = mlp()
        self.whole = whole
        self.options = options or {}
        self.reports = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return MSE(self(x) if self.whole else self.net(x), y)

    def on_train_batch_end(self, *_):
        self.reports.append(self.optimizers().optimizer.last_step)

    def configure_optimizers(self):
        optimizer = AdaptedGD(self if self.whole else self.net, **{"lr": 0.3, "criterion": MSE, **self.options})
        scheduler = LinearInterpolationLR(optimizer, 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data():
    torch.manual_seed(3)
    return torch.randn(12, 4), torch.randn(12, 3)


def fit(module, tmp_path, ckpt_path=None, **options):
    trainer = new_trainer(pl, tmp_path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", AdaptedWarning)
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=4), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("whole", [True, False])
def test_fit_equals_the_plain_loop(whole, tmp_path):
    module = Regression(whole)
    fit(module, tmp_path)
    plain = Regression(whole).net
    optimizer = AdaptedGD(plain, lr=0.3, criterion=MSE)
    scheduler = LinearInterpolationLR(optimizer, 6)
    for _ in range(2):
        for x, y in zip(*(t.split(4) for t in data()), strict=True):
            optimizer.zero_grad()
            MSE(plain(x), y).backward()
            optimizer.step()
            scheduler.step()
    assert torch.equal(flat(module.net), flat(plain))
    assert all(report.num_calls == 1 and report.num_outputs == 12 for report in module.reports)


def test_accumulated_batches(tmp_path):
    module = Regression(True)
    fit(module, tmp_path, accumulate_grad_batches=3, max_epochs=1)
    assert module.reports[-1].num_calls == 3
    plain = Regression(True).net
    optimizer = AdaptedGD(plain, lr=0.3 / 6, criterion=MSE)
    x, y = data()
    MSE(plain(x), y).backward()
    optimizer.step()
    assert (flat(module.net) - flat(plain)).norm() < 1e-4 * flat(plain).norm()


def test_clipping_in_mixed_precision_says_that_it_does_nothing(tmp_path):
    with pytest.warns(AdaptedWarning, match="AdaptedGD does not read `.grad`"):
        fit(Regression(True), tmp_path, precision="bf16-mixed", gradient_clip_val=0.1)


def test_mixed_precision(tmp_path):
    module = Regression(True, {"damping": 1e-3})
    fit(module, tmp_path, precision="bf16-mixed")
    assert module.reports[-1].off_output_fraction == 0
    assert torch.isfinite(flat(module)).all()


def test_a_skipped_batch(tmp_path):
    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skips(True)
    fit(module, tmp_path)
    assert len(module.reports) == 6


def test_resume_from_a_checkpoint(tmp_path):
    straight = Regression(True)
    fit(straight, tmp_path, max_epochs=4)
    first = Regression(True)
    trainer = fit(first, tmp_path, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Regression(True)
    fit(resumed, tmp_path, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(flat(resumed), flat(straight))


def test_a_submodule_called_instead_of_the_given_module_is_followed_too(tmp_path):
    """Its Jacobian is computed by rows, because the uses of its parameters were not recorded."""
    right, wrong = Regression(False, {"damping": 0.1}), Regression(True, {"damping": 0.1})
    fit(right, tmp_path)

    def training_step(batch, batch_idx):
        return MSE(wrong.net(batch[0]), batch[1])

    wrong.training_step = training_step
    with pytest.warns(AdaptedWarning, match="Rows of the output Jacobian are taken for 6 of 6 parameters"):
        fit(wrong, tmp_path)
    assert (flat(right) - flat(wrong)).norm() <= 1e-5 * flat(right).norm()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_module_that_calls_a_functional_loss(tmp_path, seed):
    """AdaptedGD(self) is the only change: the closure from Lightning computes the loss, which determines the unit of lr."""
    torch.manual_seed(seed)
    x = torch.randn(60, 3)
    y = 3 * torch.stack([torch.sin(2 * x[:, 0]), x[:, 1] * x[:, 2]], 1)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 60), nn.Tanh(), nn.Linear(60, 2))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.huber_loss(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return AdaptedGD(self)

    module = Module()
    first = nn.functional.huber_loss(module(x), y).item()
    trainer = new_trainer(pl, tmp_path, max_epochs=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=60))
    assert nn.functional.huber_loss(module(x), y).item() <= 1e-6 * first
