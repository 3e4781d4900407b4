"""CollapseMonitor in reference mode computes what the functions compute, on the right samples."""

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from .lightning_cases import (
    CLASSES,
    HEAD,
    Drawing,
    agree,
    classifier,
    dataset,
    expected,
    fit,
    loader,
    new_classifier,
    one_hot,
    samples,
)

pl = pytest.importorskip("pytorch_lightning")
from torch_adapted_gd.collapse import neural_collapse, output_collapse  # noqa: E402
from torch_adapted_gd.lightning import CollapseConfigError, CollapseMonitor  # noqa: E402
from torch_adapted_gd.lightning.evaluation import Evaluated, joined  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
SUBSET = [21, 4, 0, 13, 2, 8, 17]
DOUBLE = {"precision": "64-true"}


def last(tmp_path, train, module=None, monitor=None, **options):
    """The last row of the history, and the network."""
    module = new_classifier(pl) if module is None else module
    monitor = CollapseMonitor(CLASSES, head=HEAD) if monitor is None else monitor
    fit(pl, module, tmp_path, monitor, train, **{**DOUBLE, **options})
    return monitor.history[-1], module


def part(indices):
    x, labels = samples()
    return x[list(indices)], labels[list(indices)]


TRAINS = {
    "in order": (loader, range(23), {}),
    "shuffled": (lambda: loader(shuffle=True), range(23), {}),
    "drop_last": (lambda: loader(shuffle=True, drop_last=True), range(23), {}),
    "replacement": (lambda: loader(sampler=RandomSampler(dataset(), True, 10)), range(23), {}),
    "subset": (lambda: loader(sampler=SubsetRandomSampler(SUBSET)), SUBSET, {}),
    "weights": (lambda: loader(sampler=WeightedRandomSampler([0, 1, 2] * 5 + [0, 1, 0] + [0] * 5, 16)),
                [i for i in range(17) if i % 3 and i != 17], {}),
    "batch sampler": (
        lambda: DataLoader(dataset(), batch_sampler=BatchSampler(SubsetRandomSampler(SUBSET), 4, True)), SUBSET, {}),
    "overfit": (lambda: loader(shuffle=True), range(16), {"overfit_batches": 2}),
    "part of an epoch": (loader, range(23), {"limit_train_batches": 1}),
    "accumulated": (loader, range(23), {"accumulate_grad_batches": 2}),
    "one batch": (lambda: loader(batch_size=23), range(23), {}),
    "workers": (lambda: loader(num_workers=1), range(23), {"max_epochs": 1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAINS)
def test_all_samples_of_the_training_set_and_no_others(kind, tmp_path):
    make, indices, options = TRAINS[kind]
    row, module = last(tmp_path, make(), **options)
    assert row["num_samples"] == len(indices)
    agree(row, expected(module, part(indices), HEAD))


def test_batches_are_joined_until_they_are_large():
    parts = [Evaluated(x, labels, x, labels) for x, labels in loader(batch_size=4)]  # of 4, 4, 4, 4, 4 and 3 samples
    for most, sizes in ((0, [4, 4, 4, 4, 4, 3]), (sum(part.nbytes for part in parts[0]), [8, 8, 7]), (2**25, [23])):
        together = list(joined(parts, most))
        assert [len(batch.target) for batch in together] == sizes
        assert torch.equal(torch.cat([batch.features for batch in together]), samples()[0])


@pytest.mark.parametrize("options", [{}, {"hpd_lambda": 0.01}, {"weighting": "sample"}], ids=str)
@pytest.mark.parametrize("reference", ["train", "shuffled", "list"])
def test_two_passes_through_the_network_are_one_with_memory(reference, options, tmp_path):
    references = {"train": "train", "shuffled": loader(shuffle=True), "list": list(loader())}
    limit = None if reference == "train" else 2
    rows = []
    for size in (0, 500, 2**20):
        monitor = CollapseMonitor(
            CLASSES, head=HEAD, reference=references[reference], cache_bytes=size, limit_batches=limit, **options
        )
        row, module = last(tmp_path, loader(), monitor=monitor)
        rows.append(row)
    assert rows[0] == rows[1] == rows[2]
    if reference == "train":
        agree(row, expected(module, samples(), HEAD, **options))
        assert 0 < row["nc4_mismatch"] < 1
    else:
        assert row["num_samples"] == 16


def test_an_explicit_loader_is_taken_as_it_is(tmp_path):
    test = TensorDataset(*samples(31))
    for reference in (DataLoader(test, batch_size=4, drop_last=True), list(DataLoader(test, batch_size=4))[:7]):
        row, module = last(tmp_path, loader(), monitor=CollapseMonitor(CLASSES, head=HEAD, reference=reference))
        x, labels = samples(31)
        agree(row, expected(module, (x[:28], labels[:28]), HEAD))
    made = CollapseMonitor(CLASSES, reference=lambda trainer, module: trainer.train_dataloader, limit_batches=1)
    row, module = last(tmp_path, loader(), monitor=made)
    agree(row, expected(module, part(range(8))))


def test_a_shuffled_reference_has_the_same_samples_each_time(tmp_path):
    for generator in (None, torch.Generator().manual_seed(2)):
        rows = []
        for cache_bytes in (0, 2**20):  # two passes through the loader, and one
            batches = BatchSampler(RandomSampler(dataset(), generator=generator), 8, True)
            reference = DataLoader(dataset(), batch_sampler=batches)
            monitor = CollapseMonitor(CLASSES, reference=reference, head=HEAD, cache_bytes=cache_bytes)
            module = new_classifier(pl, lr=0.0)
            module.net[1].momentum = 0.0  # nothing moves
            last(tmp_path, loader(), module, monitor)
            rows += monitor.history
        assert len(rows) == 6
        assert all(row[key] == value for row in rows for key, value in rows[0].items() if key not in ("epoch", "step", "s"))


@pytest.mark.parametrize(
    "every", [{"every_n_epochs": 2}, {"every_n_epochs": None}, {"every_n_steps": 2, "every_n_epochs": None}]
)
@pytest.mark.parametrize("at_start", [True, False])
def test_when(every, at_start, tmp_path):
    monitor = CollapseMonitor(CLASSES, at_start=at_start, **every)
    fit(pl, new_classifier(pl), tmp_path, monitor, loader(), accumulate_grad_batches=2, max_epochs=4)
    steps = [4, 8] if every.get("every_n_epochs") else [2, 4, 6, 8] if "every_n_steps" in every else []
    assert [row["step"] for row in monitor.history] == [0] * at_start + steps
    assert [row["epoch"] for row in monitor.history] == [row["step"] / 2 for row in monitor.history]


def test_steps_within_an_epoch(tmp_path):
    weights = []

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            weights.append(expected(module, samples()))

    monitor = CollapseMonitor(CLASSES, every_n_steps=1)
    fit(pl, new_classifier(pl), tmp_path, [monitor, Notes()], loader(), **DOUBLE)
    assert [row["epoch"] for row in monitor.history] == pytest.approx([k / 3 for k in range(7)])
    for row, values in zip(monitor.history[1:], weights, strict=True):
        agree(row, values)


class Validates(classifier(pl)):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}, {"num_sanity_val_steps": 1}], ids=str)
def test_the_validation_set(options, tmp_path):
    monitor = CollapseMonitor(CLASSES, reference="val", head=HEAD)
    module = Validates()
    trainer = fit(pl, module, tmp_path, monitor, loader(), loader(11), **DOUBLE, **options)
    assert [row["step"] for row in monitor.history] == [0, 3, 6]
    agree(monitor.history[-1], expected(module, samples(11), HEAD))
    assert "val_ref/nc1_pinv" in trainer.callback_metrics


# What a batch is.


class Named(pl.LightningModule):
    """Batches are dicts, outputs are scaled, and there are samples without a label."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))

    def forward(self, batch):
        return {"logits": 2 * self.net(batch["x"])}

    def training_step(self, batch, batch_idx):
        return self(batch)["logits"].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def as_dicts(labels):
    x = samples()[0]
    rows = [{"x": x[i], "y": labels[i], "index": i} for i in range(23)]
    return DataLoader(rows, batch_size=8)


def test_dicts_and_samples_without_a_label(tmp_path):
    x, labels = samples()
    labels = labels.clone()
    labels[::4] = -100
    module = Named()
    monitor = CollapseMonitor(
        CLASSES, head="net.2", step_fn=lambda module, batch: (module(batch)["logits"], batch["y"]), ignore_index=-100
    )
    row, _ = last(tmp_path, as_dicts(labels), module, monitor)
    kept = labels >= 0
    with torch.no_grad():
        values = output_collapse(module({"x": x.double()})["logits"], labels, CLASSES, ignore_index=-100)
        features = module.net[:2](x.double())
    values |= neural_collapse(features[kept], labels[kept], module.net[2].weight, module.net[2].bias)
    agree(row, {key: float(value) for key, value in values.items()})
    assert (row["num_dropped"], row["num_samples"]) == (6, 17)


def test_targets_of_classes_and_longer_batches(tmp_path):
    x, labels = samples()
    targets = torch.tensor([[1.0, -0.5], [0.0, 0.3], [2.0, 0.0]])

    class Weighted(classifier(pl)):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[2]), batch_idx)

    train = DataLoader(TensorDataset(x, torch.rand(23), labels), batch_size=8)
    row, module = last(tmp_path, train, Weighted(), CollapseMonitor(CLASSES, target_fn=lambda batch: batch[2]))
    agree(row, expected(module, samples()))

    class Regression(classifier(pl)):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - batch[1]).square().mean()

    rows = DataLoader(TensorDataset(x, targets[labels]), batch_size=8)
    module = Regression(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)))
    row, module = last(
        tmp_path, rows, module, CollapseMonitor(3, targets.double(), head="net.2", nc=False), precision="32-true"
    )
    values = output_collapse(module(x), labels, 3, targets)
    agree(row, {key: float(value) for key, value in values.items()}, rel=1e-6)
    assert "nc3" not in row


def test_moving_a_batch_is_what_the_module_says(tmp_path):
    class Moves(classifier(pl)):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            x, labels = super().transfer_batch_to_device(batch, device, dataloader_idx)
            return x + 1, labels

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + torch.randn_like(batch[0]), batch[1]  # augmentation

    row, module = last(tmp_path, loader(), Moves())
    x, labels = samples()
    agree(row, expected(module, (x.double() + 1, labels), HEAD))


# What cannot be.


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in zip(*samples(), strict=True)])


class Flips(Dataset):
    """The most common augmentation: random flips."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        x, labels = samples()
        return x[index].flip(0) if torch.rand(1) < 0.5 else x[index], labels[index]


class Odd(Sampler):
    def __init__(self):
        pass

    def __iter__(self):
        return iter(range(1, 23, 2))

    def __len__(self):
        return 11


class OddBatches(Odd):
    batch_size = 1

    def __iter__(self):
        return ([i] for i in range(1, 23, 2))


LOADERS = {
    "has no fixed order": lambda: DataLoader(Endless(), batch_size=4),
    "sample 0 of its dataset changes each time": lambda: DataLoader(Flips(), batch_size=4),
    "dataset changes each time": lambda: DataLoader(Drawing(1e-3), batch_size=4),
    "draws samples by a Odd,": lambda: loader(sampler=Odd()),
    "draws samples by a OddBatches": lambda: DataLoader(dataset(), batch_sampler=OddBatches()),
    "has batches but no batch size": lambda: DataLoader(dataset(), batch_sampler=[[0, 1], [2, 3]]),
    "is a list and not one torch DataLoader": lambda: list(loader()),
    "is a dict and not one": lambda: {"a": loader(), "b": loader()},
    "Batches should be (x, y), but one is a list of 3": lambda: DataLoader(
        TensorDataset(*samples(), samples()[1]), batch_size=4
    ),
}


@pytest.mark.parametrize("words", LOADERS)
def test_loaders_that_do_not_say_what_to_evaluate_on(words, tmp_path):
    import re

    with pytest.raises(CollapseConfigError, match=re.escape(words)):
        fit(pl, new_classifier(pl), tmp_path, CollapseMonitor(CLASSES), LOADERS[words]())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "head"}, "'head' is not there. It has net.0, net.4, net.6"),
        ({"head": "net.2"}, "'net.2' is a Tanh"),
        ({"head": "net.4"}, "'net.4' has 6. Pass nc=False"),
        ({"head": "net"}, "'net' is a Sequential"),
        ({"reference": "val"}, '"val", but the trainer has no such loader'),
        ({"reference": lambda trainer, module: 3}, "should give batches to iterate over, but gave int"),
        ({"reference": lambda trainer, module: iter([])}, "gave an iterator, list_iterator"),
        ({"reference": [{"x": 1}]}, "one is a dict of 1. Pass `target_fn`, .* `step_fn`"),
        ({"reference": ["ab"]}, "one is a str of 2"),
    ],
)
def test_monitors_that_do_not_fit(options, words, tmp_path):
    with pytest.raises(CollapseConfigError, match=words):
        fit(pl, new_classifier(pl), tmp_path, CollapseMonitor(CLASSES, **options))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        *[
            ({"mode": "stream", **option}, CollapseConfigError, f'`{next(iter(option))}` is for mode="reference"')
            for option in ({"step_fn": max}, {"every_n_steps": 1}, {"limit_batches": 2}, {"at_start": True}, {"autocast": True})
        ],
        ({"hpd_lambda": 0.1}, CollapseConfigError, "`hpd_lambda` should come with the `head`"),
        ({"hpd_lambda": 0.1, "head": "x", "nc": False}, CollapseConfigError, "`hpd_lambda` should come with"),
        ({"mode": "both"}, ValueError, "`mode` should be one of 'reference', 'stream', but got 'both'"),
        ({"reference": "test"}, ValueError, "`reference` should be one of 'train', 'val', but got 'test'"),
        ({"reference": 3}, TypeError, "a function of trainer and module, but got int"),
        ({"reference": iter([])}, TypeError, "but got list_iterator"),
        ({"weighting": "both"}, ValueError, "`weighting` should be one of"),
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs` should be at least 1, but got 0"),
        ({"every_n_steps": 1.5}, TypeError, "`every_n_steps` should be a whole number"),
        ({"limit_batches": True}, TypeError, "`limit_batches` should be a whole number"),
        ({"cache_bytes": -1}, ValueError, "`cache_bytes` should be at least 0"),
        ({"per_class": 1}, TypeError, "`per_class` should be True or False"),
        ({"num_classes": 0}, ValueError, "`num_classes` should be at least 1"),
        ({"class_targets": torch.eye(4)}, ValueError, "`class_targets` should be a tensor"),
    ],
)
def test_options_that_are_wrong(options, error, words):
    with pytest.raises(error, match=words):
        CollapseMonitor(**{"num_classes": CLASSES, **options})


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "zero_stage_3"])
def test_sharded_networks_are_refused(name):
    strategy = type("Mine", (type(name, (), {}),), {"zero_stage_3": name == "zero_stage_3"})()
    trainer = type("Fake", (), {"strategy": strategy})()
    with pytest.raises(CollapseConfigError, match="but Mine shards it. Use DDP"):
        CollapseMonitor(CLASSES).setup(trainer, new_classifier(pl), "fit")


@pytest.mark.parametrize(
    ("times", "words"), [(0, "`head` should be called once .* but was never called"), (2, "called 2 times")]
)
def test_a_head_that_is_not_called_once(times, words, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            outputs = [self.head(self.first(x)) for _ in range(times)]
            return sum(outputs) if outputs else self.first(x)[:, :CLASSES]

    with pytest.raises(RuntimeError, match=words):
        fit(pl, new_classifier(pl, Net), tmp_path, CollapseMonitor(CLASSES, head="net.head"))


def test_soft_targets_are_refused(tmp_path):
    train = DataLoader(TensorDataset(samples()[0], one_hot(samples()[1]) * 0.9 + 0.02), batch_size=8)
    with pytest.raises(ValueError, match="Soft and mixed labels have no class"):
        fit(pl, new_classifier(pl), tmp_path, CollapseMonitor(CLASSES), train)
