"""Training loops of other libraries, as their users write them: docs/frameworks.md has the same lines."""

import logging
import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_adapted_gd import AdaptedGD

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 30


@pytest.fixture(autouse=True)
def nothing_left():
    """They set variables of the environment, and start process groups."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def job():
    torch.manual_seed(0)
    x = torch.rand(64, 2) * 4 - 2
    y = torch.stack([torch.sin(x[:, 0]), x[:, 0] * x[:, 1]], 1)
    return nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 2)), x, y


def trained(model, x, y):
    with torch.no_grad():
        return nn.functional.mse_loss(model(x), y) < 1e-5


def test_lightning(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    net, x, y = job()

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.criterion = net, nn.MSELoss()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return self.criterion(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return AdaptedGD(self, criterion=self.criterion)

    for options in ({}, {"strategy": "ddp", "devices": 1}):
        trainer = pl.Trainer(
            max_epochs=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )
        trainer.fit(Module(), DataLoader(TensorDataset(x, y), batch_size=64))
        assert trained(net, x, y)
        net.load_state_dict(job()[0].state_dict())


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, x, y = job()
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(x, y), batch_size=64))
    for _ in range(STEPS):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
    assert trained(model, x, y)


def test_fabric():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model, x, y = job()
    criterion = nn.MSELoss()
    model, optimizer = fabric.setup(model, AdaptedGD(model, criterion=criterion))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        fabric.backward(loss)
        optimizer.step()
    assert trained(model, x, y)


def test_ignite():
    engine = pytest.importorskip("ignite.engine")
    model, x, y = job()
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    trainer = engine.create_supervised_trainer(model, optimizer, criterion)
    trainer.run(DataLoader(TensorDataset(x, y), batch_size=64), max_epochs=STEPS)
    assert trained(model, x, y)


def test_skorch():
    skorch = pytest.importorskip("skorch")
    model, x, y = job()

    class Regressor(skorch.NeuralNetRegressor):
        def initialize_optimizer(self, triggered_directly=True):
            self.optimizer_ = AdaptedGD(self.module_, criterion=self.criterion_)
            return self

    net = Regressor(model, criterion=nn.MSELoss, max_epochs=STEPS, batch_size=64, train_split=None, verbose=0)
    net.fit(x, y)
    assert trained(net.module_, x, y)


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    net, x, y = job()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, labels=None):
            return {"logits": self.net(x)}

    model, criterion = Model(), nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return criterion(outputs["logits"], labels)

    arguments = transformers.TrainingArguments(
        tmp_path, num_train_epochs=STEPS, per_device_train_batch_size=64, max_grad_norm=0.0, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        compute_loss_func=compute_loss,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert trained(net, x, y)
