"""What the recipes share: methods on one clock, the loop of torch's optimizers, the command line, rows on file."""

import argparse
import csv
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass
class Run:
    """One method: what was recorded of it, and a clock that starts with the object and stands while that is done.

    Attributes:
        name: Of the method.
        rows: What was recorded, ``"seconds"`` and ``"loss"`` among it.
    """

    name: str
    rows: list[dict[str, float]] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter, repr=False)

    @classmethod
    def of(cls, name: str, columns: Mapping[str, Tensor]) -> "Run":
        """One that is at hand by columns ``[T]``."""
        lists = (column.tolist() for column in columns.values())
        return cls(name, [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)])

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[float]:
        """Stop the clock; gives what it shows."""
        seconds = self.seconds
        yield seconds
        self._began = time.perf_counter() - seconds

    def record(self, measure: Callable[[], dict[str, float]], **counts: float) -> None:
        """Add a row: seconds, counts and what ``measure`` finds, which takes no time."""
        with self.paused() as seconds:
            self.rows.append({"seconds": seconds, **counts, **measure()})

    def column(self, key: str) -> list[float]:
        """One quantity of all rows."""
        return [row[key] for row in self.rows]

    def due(self, interval: float) -> bool:
        """Whether the last row is older than ``interval`` seconds."""
        return self.seconds > self.rows[-1]["seconds"] + interval

    def times(self, count: int, unit: str = "step") -> Iterator[int]:
        """Count from 1 to ``count``, with a progress bar."""
        with tqdm(range(1, count + 1), desc=self.name, unit=unit, leave=False, disable=_not_first()) as bar:
            for k in bar:
                yield k
                bar.set_postfix(loss=f"{self.rows[-1]['loss']:.1e}")

    def until(self, seconds: float) -> Iterator[int]:
        """Count from 1 until the clock shows ``seconds``, with a progress bar."""
        k = 0
        with tqdm(total=round(seconds, 1), desc=self.name, unit="s", leave=False, disable=_not_first()) as bar:
            while self.seconds < seconds:
                k += 1
                yield k
                bar.update(min(self.seconds, seconds) - bar.n)
                bar.set_postfix(loss=f"{self.rows[-1]['loss']:.1e}")


def gradient_of(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The closure that torch's optimizers evaluate: gradients of ``loss()``, and its value."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call, unused-ignore]
        return value

    return closure


def adam(parameters: Iterator[Tensor], lr: float) -> torch.optim.Optimizer:
    """Adam, whose learning rate `train` lets fall."""
    return torch.optim.Adam(parameters, lr=lr)


def lbfgs(parameters: Iterator[Tensor]) -> torch.optim.Optimizer:
    """LBFGS that goes on until it is stopped, five iterations in each call of ``step``."""
    return torch.optim.LBFGS(parameters, max_iter=5, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")


def train(
    name: str,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    seconds: float,
    measure: Callable[[], dict[str, float]],
    count: str,
    per_gradient: float = 1.0,
) -> Run:
    """Train by an optimizer of torch's until the time is up; Adam's learning rate falls to zero with it, like a cosine.

    Args:
        name: Of the method.
        optimizer: Any of torch's that takes a closure.
        loss: The loss of the next batch.
        seconds: How long.
        measure: What to record beside the time.
        count: Name of a column that counts gradients.
        per_gradient: What one gradient counts.
    """
    gradients = 0

    def counted() -> Tensor:
        nonlocal gradients
        gradients += 1
        return loss()

    closure = gradient_of(optimizer, counted)
    first_rates = [group["lr"] for group in optimizer.param_groups]
    run = Run(name)
    run.record(measure, **{count: 0})
    for _ in run.until(seconds):
        if isinstance(optimizer, torch.optim.Adam):
            for group, rate in zip(optimizer.param_groups, first_rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * min(1.0, run.seconds / seconds))) / 2
        optimizer.step(closure)  # type: ignore[arg-type]
        if run.due(seconds / 100):
            run.record(measure, **{count: gradients * per_gradient})
    run.record(measure, **{count: gradients * per_gradient})
    return run


def step_on(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    steps: int,
    measure: Callable[[], dict[str, float]],
    count: str = "steps",
    shown: Mapping[str, str] | None = None,
) -> Run:
    """Take steps with a closure, and record each.

    Args:
        optimizer: Any that takes a closure.
        loss: The loss.
        steps: How many.
        measure: What to record beside the time.
        count: Name of the column that counts steps.
        shown: What is printed every ten steps beside the time: headings and names of columns. None prints nothing.
    """
    closure = gradient_of(optimizer, loss)
    run = Run(type(optimizer).__name__)
    run.record(measure, **{count: 0})
    if shown is not None:
        print(f"{'step':>5s} {'seconds':>8s} " + " ".join(f"{heading:>10s}" for heading in shown))
    for step in run.times(steps):
        optimizer.step(closure)  # type: ignore[arg-type]
        run.record(measure, **{count: step})
        if shown is not None and (step % 10 == 0 or step == steps):
            cells = (f"{run.rows[-1][key]:{max(len(heading), 10)}.2e}" for heading, key in shown.items())
            print(f"{step:5d} {run.rows[-1]['seconds']:8.1f} " + " ".join(cells), flush=True)
    return run


def new_figure(width: float = 6.4, height: float = 4.4, dpi: int = 150, **grid: Any) -> tuple["Figure", Any]:
    """A figure and its axes, in a grid as for ``Figure.subplots``."""
    from matplotlib.figure import Figure  # not by pyplot: no window, and no global state

    figure = Figure(figsize=(width, height), layout="constrained", dpi=dpi)
    return figure, figure.subplots(**grid)


def draw_map(figure: "Figure", ax: "Axes", values: Tensor, extent: tuple[float, ...], **style: Any) -> None:
    """Draw a function of t and x on a grid ``[T, X]``, with a scale of colours.

    Args:
        figure: The figure.
        ax: Where in it.
        values: The function.
        extent: The first and last t, the first and last x.
        style: Of ``imshow``, and ``title``.
    """
    ax.set(xlabel="t", ylabel="x", title=style.pop("title"))
    frame: dict[str, Any] = {"origin": "lower", "extent": extent, "aspect": "auto", "interpolation": "nearest"}
    figure.colorbar(ax.imshow(values.T.numpy(), **frame, **style), ax=ax)


def draw_error(figure: "Figure", ax: "Axes", error: Tensor, extent: tuple[float, ...]) -> None:
    """Draw |u − exact| on a grid ``[T, X]``, over five decades."""
    from matplotlib.colors import LogNorm

    most = float(error.max())
    norm = LogNorm(most * 1e-5, most)
    draw_map(figure, ax, error.clamp_min(most * 1e-5), extent, cmap="magma", norm=norm, title="|u − exact|")


def draw_columns(ax: "Axes", run: Run, columns: Mapping[str, str], title: str) -> None:
    """Draw columns of a run against its steps, by label, on a logarithmic scale."""
    for label, column in columns.items():
        ax.plot(run.column("steps"), run.column(column), label=label)
    ax.set(yscale="log", xlabel="steps", title=title)
    tidy(ax)


def tidy(ax: "Axes") -> None:
    """A frame with two sides, a grid, and a legend."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize="small")


def write_rows(path: Path, key: str, runs: Sequence[Run]) -> Path:
    """Write the rows of all runs as CSV, the first column, ``key``, being the run's name."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [key, *runs[0].rows[0]])
        writer.writeheader()
        writer.writerows({key: run.name, **row} for run in runs for row in run.rows)
    return path


def write_all(out: Path, runs: Sequence[Run], figures: Mapping[str, "Figure"]) -> None:
    """Write the rows of all methods, and the figures by file name; prints where.

    Args:
        out: The folder.
        runs: The methods.
        figures: What to save beside ``metrics.csv``.
    """
    files = [write_rows(out / "metrics.csv", "method", runs)]
    for name, figure in figures.items():
        files.append(out / name)
        figure.savefig(files[-1])
    print(f"wrote {', '.join(map(str, files))}")


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number above 0, but got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """A number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a number above 0, but got {text!r}")
    return value


def not_negative(text: str) -> float:
    """A number, at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a number, at least 0, but got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def seed(text: str) -> int:
    """A seed that torch takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"should be a whole number from 0 to 2^63 - 1, but got {text!r}")
    return int(text)


def new_parser(doc: str | None, out: str, files: str, smoke: str) -> argparse.ArgumentParser:
    """A command line with the options of every recipe.

    Args:
        doc: The recipe's docstring.
        out: Where it writes by default.
        files: What it writes there.
        smoke: What a run of seconds is.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=seed, default=0, help="of everything random (0)")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder for {files} ({out})")
    parser.add_argument("--smoke", action="store_true", help=f"a run of seconds: {smoke}")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, smoke: Mapping[str, Any]) -> argparse.Namespace:
    """The options; with ``--smoke``, those of ``smoke`` are the defaults."""
    options = parser.parse_args(arguments)
    if options.smoke:
        parser.set_defaults(**smoke)
        options = parser.parse_args(arguments)
    return options


def _not_first() -> bool | None:
    """Whether this is one of several processes, but the first; else None, which has bars drawn on terminals alone."""
    return True if int(os.environ.get("RANK", "0")) else None


@contextmanager
def launched() -> Iterator[slice]:
    """Start torch.distributed where torchrun has started several processes; the first one alone prints.

    Yields:
        Which of the samples are those of this process.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with ExitStack() as stack:
        if size > 1:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            stack.callback(dist.destroy_process_group)
            stack.callback(dist.barrier)
        if rank:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield slice(rank, None, size)


@contextmanager
def errors_in_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the program with status 2 and one line where something that a user can change goes wrong."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def make_folder(out: Path) -> None:
    """Make the folder of ``--out``.

    Raises:
        OSError: It cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file: name a folder.")
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def started(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, smoke: Mapping[str, Any]
) -> Iterator[argparse.Namespace]:
    """The options, as `parse` reads them, with the folder of ``--out`` made; errors of users end in one line."""
    options = parse(parser, arguments, smoke)
    with errors_in_one_line(parser):
        make_folder(options.out)
        yield options
