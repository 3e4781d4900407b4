"""Final-layer and neural collapse of any Lightning classifier, logged as it trains."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checks import one_of, positive_integer, real_number, true_or_false
from ..collapse.features import FeatureOptions
from ..collapse.labels import ClassTargets
from .batches import Step, TargetOf, WatchedModule, forward_context, linear_layer, outputs_and_target, target_of, to_device
from .evaluation import Evaluation, Figures
from .frameworks import Callback, CollapseConfigError, LightningModule, Trainer
from .history import History, Row
from .reference import Reference, ReferenceSet, frozen, isolated_rng

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}


class CollapseMonitor(Callback):
    """Logs how a classifier's outputs collapse to the targets of their classes (3.8)-(3.13), and its features: NC1 to NC4.

    Works with any LightningModule, optimizer and number of processes (DDP), under ``lightning.pytorch`` and
    ``pytorch_lightning``.

    In reference mode the network is evaluated on the same samples each time, with its weights frozen and in evaluation mode.
    Training is the same, to the bit, as without the monitor. In stream mode the monitor gathers the outputs that training
    computes over an epoch, while the weights change: ``within`` then includes this drift and the noise of dropout. The weights
    stay the same in validation and tests.

    Logged as ``{name}/{key}``:

    - always: ``loss``, ``within``, ``bias``, ``gap``, ``within_fraction``, ``bias_max``, ``within_max``, ``target_accuracy``,
      ``num_samples``, ``classes_seen``, ``num_dropped``, see `collapse.output_collapse`;
    - from the second evaluation on: ``rate_loss``, ``rate_within``, ``rate_bias`` = −Δ ln(q)/Δs, 2 for x = y + e^(−s) (x₀ − y);
    - with ``per_class``: ``within_class_{j}``, ``bias_class_{j}``;
    - with ``head``: ``nc1_*``, ``nc2_*``, ``nc3``, ``nc3_etf``, ``nc4_mismatch``, see `collapse.neural_collapse`; in stream
      mode without ``nc4_mismatch``, which needs a second pass;
    - with ``hpd_lambda``: ``hpd_nc1``, ``hpd_nc23``, ``hpd_perp``.

    ``history`` has the same numbers, also without a logger: one row for each evaluation, with ``epoch`` (epochs done),
    ``step``, ``s`` and the values of each class.

    Args:
        num_classes: K.
        class_targets: y_j, ``[K, d]``; by default the unit vectors e_j.
        reference: ``"train"`` or ``"val"``, to evaluate all samples of that loader, in order; or a DataLoader, a list of
            batches, or a function of trainer and module that returns one, to evaluate its batches as they are.
        mode: ``"reference"`` or ``"stream"``.
        every_n_epochs: Evaluate, or log what was gathered, at the end of every n-th epoch; None for never.
        every_n_steps: Evaluate after every n-th optimizer step, too; None for never. Not in stream mode.
        at_start: Evaluate before the first step, too; by default in reference mode. Not in stream mode.
        head: Name of the last layer in the module, as in ``named_modules()``. It has to be linear. It turns on NC1 to NC4. In
            stream mode its output is taken as the network's.
        nc: Whether to compute NC1 to NC4 if ``head`` is given.
        hpd_lambda: λ > 0, to add the split of Han, Papyan & Donoho (2022).
        weighting: ω_j in the mean over classes: ``"class"`` (1/K') or ``"sample"`` (N_j/N).
        step_fn: From module and batch to outputs and target; by default ``module(x), y`` for a batch ``(x, y)``. Not in
            stream mode.
        target_fn: From batch to target; by default y of ``(x, y)``.
        ignore_index: Label of samples to leave out.
        autocast: Evaluate under the trainer's autocast; by default in the parameters' own precision. Not in stream mode.
        cache_bytes: Features are kept up to this size for NC4, which needs the class means first; beyond, two passes are run.
        limit_batches: The largest number of batches to evaluate. Not in stream mode.
        per_class: Log the values of each class.
        name: Root of the keys; by default ``train_ref``, ``val_ref`` or ``ref``, and ``train_stream``, ``val_stream`` and
            ``test_stream``.
        sep: What separates root and key.
        prog_bar: Show ``within`` and ``bias`` in the progress bar.
        keep_history: Fill ``history``.
        log_figure: At the end of training, send the page of curves to loggers that take figures (TensorBoard), if matplotlib is
            installed.
        time_fn: s for the rates, from trainer and module; by default the number of optimizer steps.

    Raises:
        CollapseConfigError: Options do not fit each other, the module, the data or the strategy (FSDP, DeepSpeed stage 3 and
            model parallelism shard the network). Raised before training begins.
        TypeError: An option has another type.
        ValueError: An option is out of its range.
        RuntimeError: The last layer is not called exactly once for each batch.

    Example:
        >>> monitor = CollapseMonitor(num_classes=10, head="net.4")  # for Trainer(callbacks=[monitor])
        >>> monitor.history
        []
    """

    def __init__(
        self,
        num_classes: int,
        class_targets: Tensor | None = None,
        *,
        reference: Reference = "train",
        mode: str = "reference",
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        at_start: bool | None = None,
        head: str | None = None,
        nc: bool = True,
        hpd_lambda: float | None = None,
        weighting: str = "class",
        step_fn: Step | None = None,
        target_fn: TargetOf | None = None,
        ignore_index: int | None = None,
        autocast: bool = False,
        cache_bytes: int = 512 * 2**20,
        limit_batches: int | None = None,
        per_class: bool = False,
        name: str | None = None,
        sep: str = "/",
        prog_bar: bool = False,
        keep_history: bool = True,
        log_figure: bool = True,
        time_fn: Callable[[Trainer, LightningModule], float] | None = None,
    ) -> None:
        super().__init__()
        self.targets = ClassTargets(num_classes, class_targets)
        self.mode = one_of("mode", mode, ("reference", "stream"))
        if isinstance(reference, str):
            one_of("reference", reference, ("train", "val"))
        elif not (callable(reference) or isinstance(reference, Iterable)) or isinstance(reference, Iterator):
            raise TypeError(
                '`reference` should be "train", "val", a DataLoader, a list of batches or a function of trainer and module, '
                f"but got {type(reference).__name__}."
            )
        counts = {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps, "limit_batches": limit_batches}
        for option, count in counts.items():
            if count is not None:
                positive_integer(option, count)
        real_number("cache_bytes", cache_bytes, low=0)
        if mode == "stream":
            unused = {
                "every_n_steps": every_n_steps, "limit_batches": limit_batches, "at_start": at_start, "step_fn": step_fn,
                "autocast": autocast or None,
            }  # fmt: skip
            for option, value in unused.items():
                if value is not None:
                    raise CollapseConfigError(
                        f'`{option}` is for mode="reference", but got {value!r} with "stream", which uses the outputs that '
                        "training computes. Leave it out; `target_fn` takes the target from a batch."
                    )
        if hpd_lambda is not None and (head is None or not nc):
            raise CollapseConfigError("`hpd_lambda` should come with the `head` whose loss it splits, but got no head.")
        self.options = FeatureOptions(weighting, None, hpd_lambda)
        self.reference = reference
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.at_start = mode == "reference" if at_start is None else true_or_false("at_start", at_start)
        self.head = head
        self.nc = true_or_false("nc", nc)
        self.ignore_index = ignore_index
        self.cache_bytes = int(cache_bytes)
        self.limit_batches = limit_batches
        self.per_class = true_or_false("per_class", per_class)
        self.name = name
        self.sep = sep
        self.prog_bar = true_or_false("prog_bar", prog_bar)
        self.log_figure = true_or_false("log_figure", log_figure)
        self.time_fn = time_fn
        self.step_fn = step_fn
        self.target_fn = target_fn
        self.autocast = true_or_false("autocast", autocast)
        self._history = History(true_or_false("keep_history", keep_history))
        self._resumed = False  # from a checkpoint, in this run
        self._part = 0.0  # of the epoch that was done after the newest training batch
        self._set: ReferenceSet | None = None
        self._evaluations: dict[str, Evaluation] = {}  # by root
        self._watched: WatchedModule | None = None  # in stream mode

    @property
    def history(self) -> list[Row]:
        """A row for each evaluation, in plain numbers."""
        return self._history.rows

    def plot(self, x: str = "epoch") -> Figure:
        """A page of the curves in ``history``, on log axes: outputs by class, their squared distances, NC1 to NC4.

        Args:
            x: The abscissa: ``"epoch"``, ``"step"`` or ``"s"``.

        Raises:
            ImportError: Matplotlib is not installed.
            ValueError: There is no history.
        """
        return self._history.plot(x)

    # Both modes.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Check that the monitor fits the strategy and the module."""
        strategy = type(trainer.strategy)
        if _SHARDED & {cls.__name__ for cls in strategy.__mro__} or getattr(trainer.strategy, "zero_stage_3", False):
            raise CollapseConfigError(
                f"CollapseMonitor should see the whole network in each process, but {strategy.__name__} shards it. Use DDP, or "
                "take the monitor out."
            )
        head = self._find_head(pl_module)
        if self.mode == "stream" and self._watched is None:
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # code that was compiled before would not call the hooks
            self._watched = WatchedModule(head or pl_module, "the module" if head is None else "`head`")

    def teardown(self, *_: Any, **__: Any) -> None:
        """Remove the hooks."""
        if self._watched is not None:
            self._watched.close()
        self._watched, self._set, self._evaluations = None, None, {}
        self._resumed = False

    on_exception = teardown  # Lightning does not tear down after an exception

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the reference samples, and evaluate the network before training."""
        if not (self._resumed or trainer.global_step):
            self._history.newest = {}  # another training: rates do not span both
        if self.mode == "reference":
            self._set = ReferenceSet.of(self.reference, trainer, pl_module, self.limit_batches)
            if self.at_start and not self._history.is_at(self._root("train"), trainer.global_step):
                self._evaluate(trainer, pl_module, float(trainer.current_epoch), bar=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gather the batch, or evaluate if it is time."""
        self._part = (batch_idx + 1) / trainer.num_training_batches
        if self.mode == "stream":
            self._gather(trainer, pl_module, outputs, batch, batch_idx)
            return
        step, n = trainer.global_step, self.every_n_steps
        due = n is not None and step > 0 and step % n == 0
        if due and not self._history.is_at(self._root("train"), step):  # the step repeats while gradients accumulate
            self._evaluate(trainer, pl_module, trainer.current_epoch + self._part)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, or log what was gathered."""
        if self.every_n_epochs is None or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if self.mode == "stream":
            self._log_gathered(trainer, pl_module)
        else:
            epoch = float(trainer.current_epoch + 1)
            if not self._history.is_at(self._root("train"), trainer.global_step, epoch):  # by `every_n_steps`
                self._evaluate(trainer, pl_module, epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Send the page of curves to loggers that take figures."""
        if not (self.log_figure and self.history and trainer.is_global_zero):
            return
        for logger in trainer.loggers:
            if type(logger).__name__ == "TensorBoardLogger":
                try:
                    figure = self.plot()
                except ImportError:
                    return
                logger.experiment.add_figure(  # type: ignore[attr-defined]
                    self._root("train") + self.sep + "collapse", figure, trainer.global_step
                )

    @property
    def state_key(self) -> str:
        """Distinguishes monitors of different names and modes in a checkpoint."""
        return self._generate_state_key(name=self._root("train"), mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain numbers."""
        return {"rows": list(self.history), "newest": dict(self._history.newest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        self._history.rows, self._history.newest = list(state_dict["rows"]), dict(state_dict["newest"])
        self._resumed = True

    def _root(self, stage: str, index: int = 0) -> str:
        """The first part of keys, for a stage of the trainer and one of its loaders."""
        if self.mode == "reference":
            return self.name or (f"{self.reference}_ref" if isinstance(self.reference, str) else "ref")
        return f"{stage}_{self.name or 'stream'}" + (f"_{index}" if index else "")

    def _find_head(self, module: LightningModule) -> nn.Linear | None:
        return None if self.head is None else linear_layer(module, self.head, self.targets.num_classes if self.nc else None)

    def _evaluation(self, root: str, module: LightningModule) -> Evaluation:
        if root not in self._evaluations:
            self._evaluations[root] = Evaluation(
                self.targets, self._find_head(module) if self.nc else None, self.options, cache_bytes=self.cache_bytes,
                one_pass=self.mode == "stream", ignore_index=self.ignore_index,
            )  # fmt: skip
        return self._evaluations[root]

    def _record(self, root: str, figures: Figures, trainer: Trainer, module: LightningModule, epoch: float) -> Figures:
        """Add a row to the history; returns what to log, by its full name."""
        s = float(trainer.global_step if self.time_fn is None else self.time_fn(trainer, module))
        figures = self._history.add(figures, name=root, epoch=epoch, step=int(trainer.global_step), s=s)
        shown = {key: value for key, value in figures.items() if self.per_class or "_class_" not in key}
        return {f"{root}{self.sep}{key}": value for key, value in shown.items()}

    def _publish(self, trainer: Trainer, values: Figures, module: LightningModule | None) -> None:
        """Send values to the loggers and to callbacks that read metrics; to the module's progress bar, if it has one now.

        Lightning's ``log`` is not used because it takes half a millisecond for each key.
        """
        trainer.callback_metrics.update(values)
        numbers = {key: float(value) for key, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**numbers, "epoch": trainer.current_epoch}, step=trainer.global_step)
        if self.prog_bar and module is not None:
            shown = {key: value for key, value in values.items() if key.endswith((f"{self.sep}within", f"{self.sep}bias"))}
            module.log_dict(shown, prog_bar=True, logger=False, batch_size=1)

    # Reference mode.

    def _evaluate(self, trainer: Trainer, module: LightningModule, epoch: float, *, bar: bool = True) -> None:
        """Evaluate the network as it is now, and log the figures."""
        if self._set is None or trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            self._set = ReferenceSet.of(self.reference, trainer, module, self.limit_batches)
        batches, root = self._set, self._root("train")
        hidden = None if trainer.progress_bar_callback is not None and trainer.is_global_zero else True

        def one_pass() -> Iterator[Any]:
            with tqdm(batches, desc=root, leave=False, delay=2.0, disable=hidden) as shown:
                for batch in shown:
                    yield to_device(trainer, module, batch)

        def step(batch: Any) -> tuple[Tensor, Tensor]:
            return outputs_and_target(module, batch, self.step_fn, self.target_fn)

        with frozen(module), isolated_rng(*batches.generators), forward_context(trainer, self.autocast):
            figures = self._evaluation(root, module).run(one_pass, step, module.device)
        self._publish(trainer, self._record(root, figures, trainer, module, epoch), module if bar else None)

    # Stream mode. Lightning calls these methods in training, validation and tests.

    def _begin_batch(self, *_: Any, **__: Any) -> None:
        if self._watched is not None:
            self._watched.begin()

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = _begin_batch

    def on_before_backward(self, *_: Any, **__: Any) -> None:
        """The forward pass is over."""
        if self._watched is not None:
            self._watched.end()

    def _begin_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was gathered before."""
        if self._watched is not None and not trainer.sanity_checking:
            stage = _stage(trainer)
            loaders = {"val": trainer.val_dataloaders, "test": trainer.test_dataloaders}.get(stage)
            for index in range(len(loaders) if isinstance(loaders, Sequence) else 1):
                self._evaluation(self._root(stage, index), pl_module).reset(pl_module.device)

    on_train_epoch_start = on_validation_epoch_start = on_test_epoch_start = _begin_epoch

    @torch.no_grad()
    def _gather(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the outputs of the batch."""
        del pl_module, outputs, batch_idx
        if self._watched is not None and not trainer.sanity_checking:
            features, preds = self._watched.only_call()
            target = target_of(batch, self.target_fn)
            self._evaluations[self._root(_stage(trainer), dataloader_idx)].add(preds, target, features)

    on_validation_batch_end = on_test_batch_end = _gather

    def _log_gathered(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures of what was gathered."""
        if self._watched is None or trainer.sanity_checking:
            return
        stage = _stage(trainer)
        part = 1.0 if stage == "train" else self._part if trainer.state.fn == "fit" else 0.0
        for root in [key for key in self._evaluations if key.startswith(stage)]:
            figures = self._evaluations[root].figures()
            values = self._record(root, figures, trainer, pl_module, trainer.current_epoch + part)
            if stage == "train":
                self._publish(trainer, values, pl_module)
            else:  # `log_dict`, so that `validate` and `test` return it
                pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    on_validation_epoch_end = on_test_epoch_end = _log_gathered


def _stage(trainer: Trainer) -> str:
    return "train" if trainer.training else "test" if trainer.testing else "val"
