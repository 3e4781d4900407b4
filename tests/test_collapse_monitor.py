"""CollapseMonitor in Lightning, under both names: training is the same to the bit as without it; what is logged, and when."""

import csv
import importlib
import random
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from .lightning_cases import (
    CLASSES,
    HEAD,
    Delicate,
    Drawing,
    agree,
    classifier,
    expected,
    fit,
    loader,
    new_classifier,
    samples,
)

pytest.importorskip("pytorch_lightning")
from torch_adapted_gd.collapse import output_collapse
from torch_adapted_gd.lightning import AdaptedStepMonitor, CollapseConfigError, CollapseMonitor

pytestmark = pytest.mark.filterwarnings("default")
PLAIN = {"name", "epoch", "step", "s"}


# Both names of Lightning.


def test_callbacks_are_of_both_names(pl):
    assert isinstance(CollapseMonitor(2), pl.Callback)
    assert isinstance(AdaptedStepMonitor(), pl.Callback)
    assert issubclass(
        CollapseConfigError, importlib.import_module(f"{pl.__name__}.utilities.exceptions").MisconfigurationException
    )
    assert issubclass(CollapseConfigError, ValueError)


@pytest.mark.parametrize("alone", [True, False])
def test_a_module_that_knows_nothing(pl, alone, tmp_path):
    monitor = CollapseMonitor(num_classes=CLASSES)
    module = new_classifier(pl)
    trainer = fit(pl, module, tmp_path, monitor if alone else [monitor])
    assert [(row["epoch"], row["step"]) for row in monitor.history] == [(0, 0), (1, 2), (2, 4)]
    agree(monitor.history[-1], expected(module, samples()), rel=1e-6)
    assert {row["num_samples"] for row in monitor.history} == {23}  # though training drops the last batch
    keys = {key for key in trainer.callback_metrics if key.startswith("train_ref/")}
    assert keys == {f"train_ref/{key}" for key, value in monitor.history[-1].items() if not isinstance(value, list)} - {
        f"train_ref/{key}" for key in PLAIN
    }


@pytest.mark.parametrize("exception", ["MisconfigurationException", "ValueError"])
def test_errors_are_caught_by_their_own_names(pl, exception, tmp_path):
    own = importlib.import_module(f"{pl.__name__}.utilities.exceptions")
    with pytest.raises(getattr(own, exception, ValueError), match="`head` should name a Linear layer"):
        fit(pl, new_classifier(pl), tmp_path, CollapseMonitor(CLASSES, head="net.9"))


# Training goes on as it would have.


def streams(generator):
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate(), generator.get_state().tolist()


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def trained(pl, optimizer, noise, tmp_path, monitor=None, **options):
    """Weights, buffers and random states after training, if the dataset draws from all sources of random numbers."""
    module = new_classifier(pl, Delicate, optimizer)
    seed(11)
    order = torch.Generator().manual_seed(5)
    train = DataLoader(Drawing(noise), batch_size=6, shuffle=True, drop_last=True, generator=order)
    callbacks = [monitor(train)] if monitor else []
    fit(pl, module, tmp_path, callbacks, train, **options)
    if monitor:
        assert len(callbacks[0].history) >= 2
    return module.state_dict(), streams(order), [part.training for part in module.modules()]


MONITORS = {
    "reference": (0.0, lambda train: CollapseMonitor(CLASSES, head="net.head", every_n_steps=1)),
    "the training loader itself": (
        0.1,
        lambda train: CollapseMonitor(CLASSES, reference=train, head="net.head", cache_bytes=0),
    ),
    "stream": (0.1, lambda train: CollapseMonitor(CLASSES, mode="stream", head="net.head")),
    "made for it": (0.1, lambda train: CollapseMonitor(CLASSES, reference=lambda *_: [samples() if torch.rand(1) else 0])),
}


@pytest.mark.parametrize("kind", MONITORS)
@pytest.mark.parametrize("optimizer", ["sgd", "adapted"])
def test_training_is_the_same_to_the_bit(lightning, optimizer, kind, tmp_path):
    noise, monitor = MONITORS[kind]
    weights, random_numbers, modes = trained(lightning, optimizer, noise, tmp_path)
    found, found_numbers, found_modes = trained(lightning, optimizer, noise, tmp_path, monitor)
    assert weights.keys() == found.keys()
    for key, value in weights.items():
        assert torch.equal(value, found[key]), key
    assert random_numbers == found_numbers
    assert modes == found_modes
    start = new_classifier(lightning, Delicate).state_dict()
    assert not torch.equal(start["net.head.weight"], weights["net.head.weight"])
    assert not torch.equal(start["net.layers.1.running_mean"], weights["net.layers.1.running_mean"])


@pytest.mark.parametrize("at_start", [True, False])
def test_a_step_that_fails_leaves_everything_as_it_was(lightning, at_start, tmp_path):
    module = new_classifier(lightning, Delicate).train()
    order = torch.Generator().manual_seed(5)
    reference = DataLoader(Drawing(0.1), batch_size=6, shuffle=True, generator=order)
    seen = []

    def step(pl_module, batch):
        assert not any(part.training for part in pl_module.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
        seen.append(pl_module(batch[0]))
        if len(seen) == 2:
            raise ZeroDivisionError("in the second batch")
        return seen[-1], batch[1]

    class Before(lightning.Callback):
        def note(self, *_):
            self.modes = [part.training for part in module.modules()]
            self.streams = streams(order)

        on_train_start = on_train_epoch_end = note

    before = Before()
    monitor = CollapseMonitor(CLASSES, reference=reference, step_fn=step, at_start=at_start)
    with pytest.raises(ZeroDivisionError, match="in the second batch") as caught:
        fit(lightning, module, tmp_path, [before, monitor])
    assert caught.traceback  # it keeps the generators alive
    assert [part.training for part in module.modules()] == before.modes
    assert module.net.layers[3].training
    assert not module.net.frozen[2].training
    assert streams(order) == before.streams
    assert not any(part._forward_hooks for part in module.modules())


# What is logged, where and when.


def test_without_a_logger_nobody_is_told_of_one(lightning, tmp_path):
    """Lightning warns about each key that is logged without a logger."""
    callbacks = [CollapseMonitor(CLASSES, every_n_steps=3), CollapseMonitor(CLASSES, mode="stream"), AdaptedStepMonitor()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no logger configured")
        fit(lightning, new_classifier(lightning, optimizer="adapted"), tmp_path, callbacks, log_every_n_steps=1)


def rows_of(logger):
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row.get("train_ref/within")]


def test_every_logged_number_has_all_its_digits(pl, tmp_path):
    loggers = importlib.import_module(f"{pl.__name__}.loggers")
    logger = loggers.CSVLogger(tmp_path)
    monitor = CollapseMonitor(CLASSES, head=HEAD)
    trainer = fit(pl, new_classifier(pl), tmp_path, monitor, logger=logger)
    rows = rows_of(logger)
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    for row, kept in zip(rows, monitor.history, strict=True):
        for key in set(kept) - PLAIN:
            if not isinstance(kept[key], list):
                assert float(row[f"train_ref/{key}"]) == kept[key], key
    for key in set(monitor.history[-1]) - PLAIN - {"within_class", "bias_class"}:
        assert float(trainer.callback_metrics[f"train_ref/{key}"]) == monitor.history[-1][key]


def test_each_step_is_logged_once(lightning, tmp_path):
    from pytorch_lightning.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    monitor = CollapseMonitor(CLASSES, every_n_steps=1)
    trainer = fit(lightning, new_classifier(lightning), tmp_path, monitor, logger=logger, log_every_n_steps=50)
    rows = rows_of(logger)
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4] == [row["step"] for row in monitor.history]
    assert [float(row["train_ref/loss"]) for row in rows] == [row["loss"] for row in monitor.history]
    assert float(trainer.callback_metrics["train_ref/loss"]) == monitor.history[-1]["loss"]


def test_sanity_checks_log_nothing(lightning, tmp_path):
    class Validates(classifier(lightning)):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    class Sends(lightning.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            self.seen = [*trainer.callback_metrics, *(row["name"] for monitor in monitors for row in monitor.history)]

    monitors = [CollapseMonitor(CLASSES, mode="stream"), CollapseMonitor(CLASSES)]
    sends = Sends()
    fit(lightning, Validates(), tmp_path, [*monitors, sends], val=loader(), num_sanity_val_steps=2)
    assert sends.seen == []
    assert [row["name"] for row in monitors[0].history] == ["val_stream", "train_stream"] * 2


def test_others_see_it_in_the_same_epoch(pl, tmp_path):
    callbacks = importlib.import_module(f"{pl.__name__}.callbacks")
    monitor = CollapseMonitor(CLASSES)
    best = callbacks.ModelCheckpoint(
        tmp_path, monitor="train_ref/within", save_top_k=-1, auto_insert_metric_name=False, filename="{epoch}"
    )
    stop = callbacks.EarlyStopping("train_ref/loss", stopping_threshold=1e9)
    trainer = fit(pl, new_classifier(pl), tmp_path, [monitor, stop, best], max_epochs=5, enable_checkpointing=True)
    assert trainer.current_epoch == 1  # the first epoch is good enough
    assert float(best.best_model_score) == monitor.history[-1]["within"]
    assert len(list(tmp_path.glob("*.ckpt"))) == 1


def test_names_classes_and_the_progress_bar(lightning, tmp_path):
    monitor = CollapseMonitor(CLASSES, name="mine", sep=".", per_class=True, prog_bar=True)
    trainer = fit(lightning, new_classifier(lightning), tmp_path, monitor)
    assert {"mine.within", "mine.bias"} <= set(trainer.progress_bar_metrics)
    assert not {"mine.loss", "mine.within_class_0"} & set(trainer.progress_bar_metrics)
    row = monitor.history[-1]
    for j in range(CLASSES):
        for key in ("within", "bias"):
            assert float(trainer.callback_metrics[f"mine.{key}_class_{j}"]) == row[f"{key}_class"][j]
    shares = torch.bincount(samples()[1]) / 23
    assert float((shares * torch.tensor(row["within_class"])).sum()) == pytest.approx(row["within"])
    assert (
        "train_ref/within_class_0"
        not in fit(lightning, new_classifier(lightning), tmp_path, CollapseMonitor(CLASSES)).callback_metrics
    )


# Precision.


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_precision(lightning, precision, autocast, tmp_path):
    monitor = CollapseMonitor(CLASSES, head=HEAD, autocast=autocast)
    dtypes = []

    class Watches(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            evaluation = monitor._evaluations["train_ref"]
            dtypes.extend(
                value.dtype for metric in (evaluation.outputs, evaluation.features) for value in metric.metric_state.values()
            )

    module = new_classifier(lightning)
    fit(lightning, module, tmp_path, [monitor, Watches()], loader(), precision=precision, max_epochs=1)
    assert set(dtypes) == {torch.float64, torch.int64}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and precision == "bf16-mixed"), torch.no_grad():
        module.eval()
        outputs = torch.cat([module(x.to(next(module.parameters()).dtype)) for x in samples()[0].split(8)])
    assert outputs.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(
        precision, torch.bfloat16 if autocast else torch.float32
    )
    values = {key: float(value) for key, value in output_collapse(outputs, samples()[1], CLASSES).items()}
    agree(monitor.history[-1], values)


def test_a_run_for_debugging_takes_one_batch(lightning, tmp_path):
    monitor = CollapseMonitor(CLASSES, head=HEAD)
    fit(lightning, new_classifier(lightning), tmp_path, monitor, loader(), fast_dev_run=True)
    assert [row["num_samples"] for row in monitor.history] == [8, 8]


def test_nothing_of_adaptedgd_is_in_the_way(lightning, tmp_path):
    """Both modes, together with AdaptedGD and accumulated gradients."""
    monitors = [CollapseMonitor(CLASSES, every_n_steps=1), CollapseMonitor(CLASSES, mode="stream"), AdaptedStepMonitor()]
    module = new_classifier(lightning, Delicate, "adapted")
    trainer = fit(lightning, module, tmp_path, monitors, loader(), accumulate_grad_batches=2, log_every_n_steps=1)
    assert [row["step"] for row in monitors[0].history] == [0, 1, 2, 3, 4]
    assert [row["num_samples"] for row in monitors[1].history] == [23, 23]
    assert "adapted/rank" in trainer.callback_metrics
