"""Final-layer and neural collapse of any Lightning classifier, logged as it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from ..checks import one_of, positive_integer, real_number, true_or_false
from ..collapse.features import FeatureOptions
from ..collapse.labels import ClassTargets
from .batches import BatchReader, Step
from .evaluation import Evaluation, Figures
from .frameworks import CollapseConfigError, LightningModule, Trainer
from .history import History, Row
from .reference import Reference, ReferenceSet, frozen
from .stream import Stream, StreamStages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}
_BAR = ("within", "bias")


class CollapseMonitor(StreamStages):
    """Logs how a classifier's outputs collapse to the targets of their classes (3.8)-(3.13), and its features: NC1 to NC4.

    Works with any LightningModule, optimizer and number of processes (DDP), under ``lightning.pytorch`` and
    ``pytorch_lightning``. In reference mode the network is evaluated with its weights frozen, in evaluation mode, on the same
    samples each time; training goes on to the bit as it would have without the monitor. In stream mode the outputs that
    training itself computes are gathered over the epoch, while weights move: ``within`` then has their drift in it, and the
    noise of dropout; in validation and tests weights stand still.

    Logged as ``{name}/{key}``:

    - always: ``loss``, ``within``, ``bias``, ``gap``, ``within_fraction``, ``bias_max``, ``within_max``, ``target_accuracy``,
      ``num_samples``, ``classes_seen``, ``num_dropped``, see `collapse.output_collapse`;
    - from the second time on: ``rate_loss``, ``rate_within``, ``rate_bias`` = −Δ ln(q)/Δs, 2 for x = y + e^(−s) (x₀ − y);
    - with ``per_class``: ``within_class_{j}``, ``bias_class_{j}``;
    - with ``head``: ``nc1_*``, ``nc2_*``, ``nc3``, ``nc3_etf``, ``nc4_mismatch``, see `collapse.neural_collapse`; in stream
      mode without ``nc4_mismatch``, which needs a second pass;
    - with ``hpd_lambda``: ``hpd_nc1``, ``hpd_nc23``, ``hpd_perp``.

    All of it is in ``history`` too, also without a logger: a row for each evaluation, with ``epoch`` (epochs done), ``step``,
    ``s`` and the values of each class.

    Args:
        num_classes: K.
        class_targets: y_j, ``[K, d]``; by default the unit vectors e_j.
        reference: What the network is evaluated on: ``"train"`` or ``"val"``, all samples of that loader, in order; or a
            DataLoader, a list of batches, or a function of trainer and module that gives one, taken as it is.
        mode: ``"reference"`` or ``"stream"``.
        every_n_epochs: Evaluate, or log what was gathered, at the end of each n-th epoch; None for never.
        every_n_steps: Evaluate after each n-th optimizer step, too; None for never. Not in stream mode.
        at_start: Evaluate before the first step, too: by default in reference mode, and not in stream mode.
        head: Name of the last layer in the module, as in ``named_modules()``, linear: turns on NC1 to NC4. In stream mode its
            output stands for the module's.
        nc: Whether to take NC1 to NC4 if ``head`` is named.
        hpd_lambda: λ > 0, to add the split of Han, Papyan & Donoho (2022).
        weighting: ω_j in the mean over classes: ``"class"`` (1/K) or ``"sample"`` (N_j/N).
        step_fn: From module and batch to outputs and target; by default ``module(x), y`` for a batch ``(x, y)``. Not in
            stream mode.
        target_fn: From batch to target; by default y of ``(x, y)``.
        ignore_index: Label of samples to leave out.
        autocast: Evaluate under the trainer's autocast; by default in the parameters' own precision. Not in stream
            mode.
        cache_bytes: Features up to so many bytes are kept for NC4, which needs the class means first; beyond, the network is
            run on the samples twice.
        limit_batches: Evaluate on so many batches at most. Not in stream mode.
        per_class: Log the values of each class.
        name: Root of the keys; by default ``train_ref``, ``val_ref`` or ``ref``, and ``train_stream``, ``val_stream`` and
            ``test_stream``.
        sep: What stands between root and key.
        prog_bar: Show ``within`` and ``bias`` in the progress bar.
        keep_history: Fill ``history``.
        log_figure: At the end of training, send the page of curves to loggers that take figures (TensorBoard), if matplotlib is
            installed.
        time_fn: s for the rates, from trainer and module; by default the number of optimizer steps.

    Raises:
        CollapseConfigError: Options do not go together or with the module, the data or the strategy (FSDP, DeepSpeed stage 3
            and model parallelism hold no whole network); raised when training begins, or before.
        TypeError: An option is of another type.
        ValueError: An option is out of its range.
        RuntimeError: The last layer is not called just once for each batch.

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
        target_fn: Callable[[Any], Tensor] | None = None,
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
                f"but got a {type(reference).__name__}."
            )
        counts = {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps, "limit_batches": limit_batches}
        for option, count in counts.items():
            if count is not None:
                positive_integer(option, count)
        real_number("cache_bytes", cache_bytes, low=0)
        if mode == "stream":
            unused = {**counts, "at_start": at_start, "step_fn": step_fn, "autocast": autocast or None}
            del unused["every_n_epochs"]
            for option, value in unused.items():
                if value is not None:
                    raise CollapseConfigError(
                        f'`{option}` is for mode="reference", but got {value!r} with "stream", which takes what training '
                        "computes. Leave it out; `target_fn` says where targets are in a batch."
                    )
        if hpd_lambda is not None and (head is None or not nc):
            raise CollapseConfigError("`hpd_lambda` should come with the `head` whose loss it splits, but none is named.")
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
        self._history = History(true_or_false("keep_history", keep_history))
        self._reader = BatchReader(step_fn, target_fn, true_or_false("autocast", autocast))
        self._evaluated = False  # whether in this run, in reference mode
        self._resumed = False  # from a checkpoint, and not yet at its end
        self._part = 0.0  # of the epoch that is behind
        self._set: ReferenceSet | None = None
        self._evaluations: dict[str, Evaluation] = {}

    @property
    def history(self) -> list[Row]:
        """A row for each evaluation, in plain numbers."""
        return self._history.rows

    # What Lightning calls.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the monitor fits the strategy and the module."""
        strategy = type(trainer.strategy)
        if _SHARDED & {cls.__name__ for cls in strategy.__mro__} or getattr(trainer.strategy, "zero_stage_3", False):
            raise CollapseConfigError(
                f"CollapseMonitor should see the whole network in each process, but {strategy.__name__} shards it. Use DDP, or "
                "take the monitor out."
            )
        head = self._find_head(pl_module)
        if self.mode == "stream" and self._stream is None:
            self._stream = Stream(head or pl_module, "the module" if head is None else "`head`")
        del stage

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._set, self._evaluations = None, None, {}
        self._resumed = self._evaluated = False
        del trainer, pl_module, stage

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the samples up, and evaluate the network as it starts."""
        if not (self._resumed or trainer.global_step):
            self._history.begin_run()
        if self.mode == "stream":
            return
        self._set = ReferenceSet.of(self.reference, trainer, pl_module, self._limit(trainer))
        seen = self._history.newest.get(self._root("train"))
        if self.at_start and not (seen and seen["step"] == trainer.global_step):
            self._publish(trainer, self._evaluate(trainer, pl_module, float(trainer.current_epoch)))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to gather."""
        self._part = 0.0
        self.begin_stage(trainer, pl_module, "train", 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gather the batch, or evaluate where it is time."""
        del outputs
        self._part = (batch_idx + 1) / trainer.num_training_batches
        if self._stream is not None:
            self.add_batch("train", 0, batch)
        elif self.every_n_steps is not None and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            seen = self._history.newest.get(self._root("train"))
            if seen is None or seen["step"] != trainer.global_step:  # not again while gradients accumulate
                values = self._evaluate(trainer, pl_module, trainer.current_epoch + self._part)
                self._publish(trainer, values, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, or log what was gathered."""
        if self.every_n_epochs is None or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if self._stream is not None:
            self.end_stage(trainer, pl_module, "train")
        else:
            epoch = float(trainer.current_epoch + 1)
            seen = self._history.newest.get(self._root("train"))
            if not (self._evaluated and seen and (seen["step"], seen["epoch"]) == (trainer.global_step, epoch)):
                # Else the last step of the epoch has been evaluated just now.
                self._publish(trainer, self._evaluate(trainer, pl_module, epoch), pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the page of curves to loggers that take figures."""
        del pl_module
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
        """Tells monitors of different names and modes apart in a checkpoint."""
        return self._generate_state_key(name=self._root("train"), mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain numbers."""
        return self._history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of a checkpoint."""
        self._history.load_state_dict(state_dict)
        self._resumed = True

    def plot(self, x: str = "epoch") -> Figure:
        """A page of the curves in ``history``, on log axes: outputs by class, their squared distances, NC1 to NC4.

        Args:
            x: The abscissa: ``"epoch"``, ``"step"`` or ``"s"``.

        Raises:
            ImportError: Matplotlib is not installed.
            ValueError: There is no history.
        """
        from ..plotting import plot_collapse_page

        return plot_collapse_page(self._history.named(), x=x)

    # How it is done.

    def _root(self, stage: str, index: int = 0) -> str:
        """The first part of keys."""
        if self.mode == "reference":
            return self.name or (f"{self.reference}_ref" if isinstance(self.reference, str) else "ref")
        return f"{stage}_{self.name or 'stream'}" + (f"_{index}" if index else "")

    def _find_head(self, module: LightningModule) -> nn.Linear | None:
        if self.head is None:
            return None
        found = dict(module.named_modules()).get(self.head)
        if not isinstance(found, nn.Linear):
            linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
            raise CollapseConfigError(
                f"`head` should name a Linear layer of {type(module).__name__}, but {self.head!r} is "
                f"{'not there' if found is None else f'a {type(found).__name__}'}. It has {', '.join(linear[-5:]) or 'none'}."
            )
        if self.nc and not is_lazy(found.weight) and found.out_features != self.targets.num_classes:
            raise CollapseConfigError(
                f"`head` should have an output for each of the {self.targets.num_classes} classes for NC3 and NC4, but "
                f"{self.head!r} has {found.out_features}. Pass nc=False to leave neural collapse out."
            )
        return found

    def _limit(self, trainer: Trainer) -> int | None:
        return 1 if trainer.fast_dev_run else self.limit_batches  # type: ignore[attr-defined]

    def _evaluation(self, root: str, module: LightningModule) -> Evaluation:
        if root not in self._evaluations:
            self._evaluations[root] = Evaluation(
                self.targets, self._find_head(module) if self.nc else None, self.options, cache_bytes=self.cache_bytes,
                one_pass=self.mode == "stream", ignore_index=self.ignore_index,
            )  # fmt: skip
        return self._evaluations[root]

    def add_batch(self, stage: str, index: int, batch: Any) -> None:
        """Gather what was computed of a batch."""
        if self._stream is not None:
            self._stream.add(self._evaluations[self._root(stage, index)], self._reader.target(batch))

    def begin_stage(self, trainer: Trainer, module: LightningModule, stage: str, loaders: int) -> None:
        """Begin to gather."""
        if self._stream is not None and not trainer.sanity_checking:
            for index in range(loaders):
                self._evaluation(self._root(stage, index), module).reset(module.device)

    def end_stage(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Log what was gathered."""
        if self._stream is None or trainer.sanity_checking:
            return
        part = 1.0 if stage == "train" else self._part if trainer.state.fn == "fit" else 0.0
        for root in [key for key in self._evaluations if key.startswith(stage)]:
            values = self._record(root, self._evaluations[root].figures(), trainer, module, trainer.current_epoch + part)
            if stage == "train":
                self._publish(trainer, values, module)
            else:  # what `validate` and `test` give back
                module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def _evaluate(self, trainer: Trainer, module: LightningModule, epoch: float) -> Figures:
        """Evaluate the network as it is now; gives what to log."""
        if self._set is None or trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            self._set = ReferenceSet.of(self.reference, trainer, module, self._limit(trainer))
        batches, root = self._set, self._root("train")
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero

        def one_pass() -> Iterator[Any]:
            with tqdm(batches, desc=root, total=batches.num_batches, leave=False, delay=2.0, disable=not shown or None) as bar:
                for batch in bar:
                    yield self._reader.moved(trainer, module, batch)

        with frozen(module), batches.replayed(), self._reader.precision(trainer):
            figures = self._evaluation(root, module).run(one_pass, partial(self._reader.outputs, module), module.device)
        self._evaluated = True
        return self._record(root, figures, trainer, module, epoch)

    def _record(self, root: str, figures: Figures, trainer: Trainer, module: LightningModule, epoch: float) -> Figures:
        """Take a row down; gives what to log of it, by its full name."""
        s = trainer.global_step if self.time_fn is None else self.time_fn(trainer, module)
        figures = self._history.add(root, figures, epoch=epoch, step=int(trainer.global_step), s=float(s))
        by_class = {key: figures.pop(key) for key in list(figures) if figures[key].ndim}
        if self.per_class:
            figures |= {f"{key}_{j}": value for key, values in by_class.items() for j, value in enumerate(values.unbind())}
        return {f"{root}{self.sep}{key}": value for key, value in figures.items()}

    def _publish(self, trainer: Trainer, values: Figures, module: LightningModule | None = None) -> None:
        """To the loggers and to callbacks that look at metrics, now. In all processes the same.

        Lightning's ``log`` takes half a millisecond for each key, as long together as a small network for 1,000 images.

        Args:
            trainer: Lightning's.
            values: What to log.
            module: Whose progress bar may show some of it; None where there is none yet.
        """
        trainer.callback_metrics.update(values)
        numbers = {key: float(value) for key, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**numbers, "epoch": trainer.current_epoch}, step=trainer.global_step)
        if self.prog_bar and module is not None:
            shown = {key: value for key, value in values.items() if key.endswith(tuple(self.sep + k for k in _BAR))}
            module.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
