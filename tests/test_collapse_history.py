"""The history of CollapseMonitor: rates, JSON, checkpoints, several monitors and several trainings."""

import inspect
import json
import math
import pickle

import pytest
import torch
from torch import nn

from .lightning_cases import (
    CLASSES,
    HEAD,
    agree,
    classifier,
    expected,
    fit,
    loader,
    new_classifier,
    new_trainer,
    one_hot,
    samples,
)

pytest.importorskip("pytorch_lightning")
from torch_adapted_gd.lightning import CollapseMonitor

pytestmark = pytest.mark.filterwarnings("default")


class Shrinks(nn.Module):
    """Outputs y + e^(−s) (x − y)."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        y = one_hot(samples()[1]).double()
        return y + self.factor * (x - y)


def test_rates_of_an_exponential_are_two(lightning, tmp_path):
    class Flows(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Shrinks()
            self.automatic_optimization = False

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.step()
            with torch.no_grad():
                self.net.factor.mul_(math.exp(-0.25))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    outputs = torch.randn(23, CLASSES, dtype=torch.float64)
    batches = [(outputs, samples()[1])]
    monitor = CollapseMonitor(CLASSES, reference=batches, time_fn=lambda trainer, module: 0.25 * trainer.global_step)
    by_step = CollapseMonitor(CLASSES, reference=batches, name="by_step")
    fit(lightning, Flows(), tmp_path, [monitor, by_step], train=loader(batch_size=23), max_epochs=4, precision="64-true")
    assert "rate_loss" not in monitor.history[0]
    for row, other in zip(monitor.history[1:], by_step.history[1:], strict=True):
        for key in ("rate_loss", "rate_within", "rate_bias"):
            assert row[key] == pytest.approx(2, rel=1e-10)
            assert other[key] == pytest.approx(0.5, rel=1e-10)
    assert len({round(row["within_fraction"], 12) for row in monitor.history}) == 1


def test_history_is_json(lightning, tmp_path):
    monitor = CollapseMonitor(CLASSES, head=HEAD)
    fit(lightning, new_classifier(lightning), tmp_path, monitor)
    assert json.loads(json.dumps(monitor.history)) == monitor.history
    assert json.loads(json.dumps(monitor.state_dict())) == monitor.state_dict()
    without = CollapseMonitor(CLASSES, keep_history=False)
    trainer = fit(lightning, new_classifier(lightning), tmp_path, without)
    assert without.history == []
    assert "train_ref/rate_loss" in trainer.callback_metrics


def test_resuming(pl, tmp_path):
    straight = CollapseMonitor(CLASSES, every_n_steps=3)
    fit(pl, new_classifier(pl), tmp_path, straight, loader(), max_epochs=4)
    trainer = fit(pl, new_classifier(pl), tmp_path, CollapseMonitor(CLASSES, every_n_steps=3), loader(), max_epochs=2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    kept = torch.load(path, weights_only=True)["callbacks"]  # plain numbers only
    key = CollapseMonitor(CLASSES).state_key
    assert [row["step"] for row in kept[key]["rows"]] == [0, 3, 6]
    resumed = CollapseMonitor(CLASSES, every_n_steps=3)
    trainer = new_trainer(pl, tmp_path, resumed, max_epochs=4)
    safely = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    module = new_classifier(pl)
    trainer.fit(module, loader(), ckpt_path=path, **safely)
    assert [(row["step"], row["epoch"]) for row in resumed.history] == [(3 * k, k) for k in range(5)]
    assert [row["step"] for row in straight.history] == [row["step"] for row in resumed.history]
    assert resumed.history[:3] == straight.history[:3]
    agree(resumed.history[-1], expected(module, samples()), rel=1e-6)


def test_one_monitor_in_two_trainings(lightning, tmp_path):
    monitor = CollapseMonitor(CLASSES, at_start=False, every_n_steps=3)
    for lr in (0.1, 0.01):
        module = new_classifier(lightning, lr=lr)
        fit(lightning, module, tmp_path, monitor, loader(), max_epochs=1)
        agree(monitor.history[-1], expected(module, samples()), rel=1e-6)
        assert "rate_loss" not in monitor.history[-1]  # not compared with another training
    assert [row["step"] for row in monitor.history] == [3, 3]


def test_training_goes_on_with_the_same_trainer(lightning, tmp_path):
    monitor = CollapseMonitor(CLASSES)
    module = new_classifier(lightning)
    trainer = fit(lightning, module, tmp_path, monitor, loader(), max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert [row["step"] for row in monitor.history] == [0, 3, 6]
    assert "rate_loss" in monitor.history[-1]


def test_two_monitors_side_by_side(lightning, tmp_path):
    monitors = [CollapseMonitor(CLASSES), CollapseMonitor(CLASSES, reference="val"), CollapseMonitor(CLASSES, mode="stream")]
    monitors += [CollapseMonitor(CLASSES, name="other", limit_batches=1), CollapseMonitor(CLASSES, mode="stream", name="o")]
    assert len({monitor.state_key for monitor in monitors}) == 5

    class Validates(classifier(lightning)):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    trainer = fit(lightning, Validates(), tmp_path, monitors, loader(), loader(11), log_every_n_steps=1)
    roots = {key.split("/")[0] for key in trainer.callback_metrics}
    assert roots == {"train_ref", "val_ref", "train_stream", "val_stream", "other", "train_o", "val_o"}
    counts = {root: float(trainer.callback_metrics[f"{root}/num_samples"]) for root in roots}
    val = dict.fromkeys(["val_ref", "val_stream", "val_o"], 11)
    assert counts == {"train_ref": 23, "train_stream": 23, "train_o": 23, "other": 8, **val}


@pytest.mark.parametrize("mode", ["reference", "stream"])
def test_monitors_can_be_sent_to_processes(lightning, mode, tmp_path):
    monitor = CollapseMonitor(CLASSES, torch.eye(CLASSES), head=HEAD, mode=mode)
    sent = pickle.loads(pickle.dumps(monitor))
    for one in (monitor, sent):
        torch.manual_seed(0)
        fit(lightning, new_classifier(lightning), tmp_path, one)
    assert sent.history == monitor.history
    assert sent.state_key == monitor.state_key


def test_the_page_of_curves_goes_to_tensorboard(lightning, tmp_path):
    pytest.importorskip("matplotlib")
    loggers = pytest.importorskip("pytorch_lightning.loggers")
    try:
        logger = loggers.TensorBoardLogger(tmp_path)
    except ModuleNotFoundError:
        pytest.skip("TensorBoard is not installed")
    figures = []
    logger.experiment.add_figure = lambda tag, figure, step: figures.append((tag, step, len(figure.axes)))
    for shown in (True, False):
        monitor = CollapseMonitor(CLASSES, head=HEAD, log_figure=shown)
        fit(lightning, new_classifier(lightning), tmp_path, monitor, loader(), logger=logger)
    assert [figure[:2] for figure in figures] == [("train_ref/collapse", 6)]
    assert figures[0][2] > 1
