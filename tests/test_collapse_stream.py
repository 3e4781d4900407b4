"""CollapseMonitor in stream mode: it gathers each output that training computes, once."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from .lightning_cases import (
    CLASSES,
    HALF,
    HEAD,
    Delicate,
    agree,
    classifier,
    expected,
    fit,
    loader,
    new_classifier,
    new_trainer,
    one_hot,
    plain,
    samples,
)

pl = pytest.importorskip("pytorch_lightning")
from torch_adapted_gd.collapse import neural_collapse, output_collapse  # noqa: E402
from torch_adapted_gd.lightning import CollapseMonitor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")


class Records(classifier(pl)):
    """Keeps the outputs of an epoch."""

    head = None

    def on_train_epoch_start(self):
        self.kept = []

    def training_step(self, batch, batch_idx):
        x, labels = batch
        features = []
        handle = self.net.get_submodule(self.head).register_forward_hook(lambda _, args, out: features.append(args[0]))
        outputs = self(x)
        handle.remove()
        self.kept.append((outputs.detach().clone(), labels, features[0].detach().clone()))
        return HALF(outputs, one_hot(labels).to(outputs.dtype))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])

    test_step = validation_step

    def recorded(self, head=None):
        outputs, labels, features = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        found = output_collapse(outputs, labels, CLASSES)
        if head is not None:
            found |= neural_collapse(features, labels, head.weight, head.bias)
            del found["nc4_mismatch"]
        return {key: float(value) for key, value in found.items()}


def recording(make=plain, head="6", optimizer="sgd"):
    module = Records(make, optimizer)
    module.head = head
    return module


@pytest.mark.parametrize("head", [None, "net.head"])
@pytest.mark.parametrize("optimizer", ["sgd", "adapted"])
def test_a_stream_is_what_training_computed(optimizer, head, tmp_path):
    """AdaptedGD repeats forward passes, also with other weights; these do not count."""
    module = recording(Delicate, "head", optimizer)
    monitor = CollapseMonitor(CLASSES, mode="stream", head=head)
    trainer = fit(pl, module, tmp_path, monitor, loader(shuffle=True))
    row = monitor.history[-1]
    agree(row, module.recorded(module.net.head if head else None))
    assert [row["num_samples"] for row in monitor.history] == [23, 23]
    assert [(row["epoch"], row["step"]) for row in monitor.history] == [(1, 3), (2, 6)]
    assert ("train_stream/nc1_pinv" in trainer.callback_metrics) is (head is not None)
    assert "train_stream/nc4_mismatch" not in trainer.callback_metrics
    parts = (module, module.net.head)
    left = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    assert not [hook for hook in left if "WatchedModule" in repr(hook)]


def test_line_searches_and_damping_do_not_count(tmp_path):
    from torch_adapted_gd import AdaptedGD, LevenbergMarquardt

    class Searches(Records):
        def configure_optimizers(self):
            return AdaptedGD(self, criterion=HALF, damping=LevenbergMarquardt())

    module = Searches(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)))
    module.head = "2"
    monitor = CollapseMonitor(CLASSES, mode="stream", head="net.2")
    fit(pl, module, tmp_path, monitor, loader())
    agree(monitor.history[-1], module.recorded(module.net[2]))


def test_lbfgs_computes_a_batch_many_times(tmp_path):
    class Repeats(classifier(pl)):
        def training_step(self, batch, batch_idx):
            self.calls = getattr(self, "calls", 0) + 1
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    module = Repeats()
    monitor = CollapseMonitor(CLASSES, mode="stream")
    fit(pl, module, tmp_path, monitor, loader(), max_epochs=1)
    assert module.calls > 6
    assert monitor.history[-1]["num_samples"] == 23


def test_a_stream_is_not_the_network_at_its_end(tmp_path):
    monitors = [CollapseMonitor(CLASSES, mode="stream"), CollapseMonitor(CLASSES)]
    still = [CollapseMonitor(CLASSES, mode="stream"), CollapseMonitor(CLASSES)]
    net = lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))  # noqa: E731
    fit(pl, new_classifier(pl, net), tmp_path, monitors, loader())
    fit(pl, new_classifier(pl, net, lr=0.0), tmp_path, still, loader(), precision="64-true")
    assert abs(monitors[0].history[-1]["loss"] - monitors[1].history[-1]["loss"]) > 1e-2
    values = {key: still[1].history[-1][key] for key in ("loss", "within", "bias", "within_class", "num_samples")}
    agree(still[0].history[-1], values)


@pytest.mark.parametrize("several", [False, True])
def test_validation_and_tests_are_exact(several, tmp_path):
    module = recording()
    monitor = CollapseMonitor(CLASSES, mode="stream", head=HEAD)
    loaders = [loader(23), loader(11)] if several else loader(11)
    trainer = fit(pl, module, tmp_path, monitor, loader(), loaders, precision="64-true")
    names = ["val_stream", "val_stream_1"] if several else ["val_stream"]
    assert [row["name"] for row in monitor.history] == [*names, "train_stream"] * 2
    assert [row["epoch"] for row in monitor.history] == [1] * (len(names) + 1) + [2] * (len(names) + 1)
    assert all(f"{name}/within" in trainer.callback_metrics for name in names)
    values = expected(module, samples(11), HEAD)
    del values["nc4_mismatch"]
    ends = {row["name"]: row for row in monitor.history}
    agree(ends[names[-1]], values)
    count = len(monitor.history)
    for stage, run in (("val", trainer.validate), ("test", trainer.test)):
        found = run(module, loader(11), verbose=False)
        agree(monitor.history[-1], values)
        assert found[0][f"{stage}_stream/within"] == monitor.history[-1]["within"]
        assert (monitor.history[-1]["name"], monitor.history[-1]["epoch"]) == (f"{stage}_stream", 2)
    assert len(monitor.history) == count + 2
    assert not module.net[6]._forward_hooks


def test_validation_within_an_epoch(tmp_path):
    monitor = CollapseMonitor(CLASSES, mode="stream", every_n_epochs=2)
    fit(pl, recording(), tmp_path, monitor, loader(batch_size=6), loader(11), val_check_interval=2)
    assert [row["epoch"] for row in monitor.history if row["name"] == "val_stream"] == [0.5, 1, 1.5, 2]
    assert [(row["epoch"], row["num_samples"]) for row in monitor.history if row["name"] == "train_stream"] == [(2, 23)]


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("head", [None, HEAD])
def test_a_module_that_is_not_called_once(times, head, tmp_path):
    class Calls(classifier(pl)):
        def training_step(self, batch, batch_idx):
            x, labels = batch
            outputs = [self(x) for _ in range(times)] or [self.net[0](x)[:, :CLASSES]]
            return HALF(outputs[-1], one_hot(labels))

    found = f"called {times} times" if times else "never called"
    words = f"{'`head`' if head else 'the module'} should be called once for each batch, but was {found}"
    with pytest.raises(RuntimeError, match=words):
        fit(pl, Calls(), tmp_path, CollapseMonitor(CLASSES, mode="stream", head=head))


def test_a_training_that_fails_leaves_no_hooks(tmp_path):
    class Fails(classifier(pl)):
        def training_step(self, batch, batch_idx):
            self(batch[0])
            raise ZeroDivisionError("in training")

    monitor = CollapseMonitor(CLASSES, mode="stream")
    module = Fails()
    with pytest.raises(ZeroDivisionError, match="in training"):
        fit(pl, module, tmp_path, monitor)
    assert not module._forward_hooks
    other = recording()
    fit(pl, other, tmp_path, monitor)
    agree(monitor.history[-1], other.recorded())


def test_outputs_are_taken_before_anybody_changes_them(tmp_path):
    class Changes(Records):
        def training_step(self, batch, batch_idx):
            x, labels = batch
            outputs = self(x)
            self.kept.append((outputs.detach().clone(), labels, outputs.detach()))
            outputs -= one_hot(labels)
            return outputs.square().mean()

    module = Changes()
    monitor = CollapseMonitor(CLASSES, mode="stream")
    fit(pl, module, tmp_path, monitor)
    agree(monitor.history[-1], module.recorded())


def test_targets_in_a_dict(tmp_path):
    x, labels = samples()
    ignored = torch.where(torch.arange(23) % 5 == 0, -1, labels)

    class Named(classifier(pl)):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"].clamp_min(0)), batch_idx)

    batches = DataLoader([{"x": x[i], "y": ignored[i]} for i in range(23)], batch_size=8)
    monitor = CollapseMonitor(CLASSES, mode="stream", target_fn=lambda batch: batch["y"], ignore_index=-1)
    fit(pl, Named(), tmp_path, monitor, batches)
    assert (monitor.history[-1]["num_samples"], monitor.history[-1]["num_dropped"]) == (18, 5)
    with pytest.raises(ValueError, match="one is a dict of 2. Pass `target_fn`"):
        fit(pl, Named(), tmp_path, CollapseMonitor(CLASSES, mode="stream"), batches)


def test_manual_optimization(tmp_path):
    class Manual(Records):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.head = "6"

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            self(batch[0])  # a call after the step

    module = Manual()
    monitor = CollapseMonitor(CLASSES, mode="stream", head=HEAD)
    fit(pl, module, tmp_path, monitor, loader())
    agree(monitor.history[-1], module.recorded(module.net[6]))


@pytest.mark.parametrize("mode", ["reference", "stream"])
def test_compiled_modules(mode, tmp_path):
    """Hooks are called, even if the module was compiled and run without them."""
    module = new_classifier(pl, lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)))
    module.net = torch.compile(module.net, backend="eager")
    for mode_of_module in (module.train, module.eval):
        mode_of_module()
        for size in (8, 7):
            module(samples()[0][:size])
            with torch.no_grad():
                module(samples()[0][:size])
    module.train()
    for _ in range(2):
        monitor = CollapseMonitor(CLASSES, mode=mode, head="net._orig_mod.2")
        trainer = new_trainer(pl, tmp_path, monitor)
        trainer.fit(module, loader())
        assert [row["num_samples"] for row in monitor.history[-2:]] == [23, 23]
        assert monitor.history[-1]["nc1_pinv"] > 0
    if mode == "reference":
        torch.compiler.reset()  # so that the hook of `expected` is called
        agree(monitor.history[-1], expected(module, samples(), "net._orig_mod.2"), rel=1e-5)
