"""The paper, claim by claim, on real digits: what each equation says, computed by the package, and held against another way.

A row for each claim of Chen & Muñoz Ewald, "Gradient flow in parameter space is equivalent to linear interpolation in output
space": its equation, what was compared, the relative error, and what rounding, differences or the integrator's tolerance
explain. "corrected" is written where the paper has a slip; the row "as printed" beside it shows that the printed formula is
off, and by how much. The exit status is 1 if any row fails.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share

import claims_fields
import claims_flows
import claims_outputs
import claims_pseudoinverse
from claims import Claim, Context, Row
from claims_objects import build
from race import above_zero, errors_in_one_line, parse, positive, seed
from tqdm import tqdm

HEADER = ("equation", "claim", "computed by", "error", "bound", "")
MODULES = (claims_fields, claims_flows, claims_outputs, claims_pseudoinverse)


def all_claims() -> list[Claim]:
    """All claims, in the paper's order."""
    return [one for module in MODULES for one in module.CLAIMS]


def rows_of(context: Context) -> Iterator[Row]:
    """The rows, with a progress bar."""
    with tqdm(all_claims(), desc="claims", unit="claim", leave=False, disable=None) as bar:
        for one in bar:
            bar.set_postfix_str(one.find.__name__)
            yield one(context)


def describe(context: Context) -> list[str]:
    """One line for each network."""
    return [
        f"{net.name}: {net.num_samples} images of {net.x.shape[1]} pixels, tanh MLP "
        f"{'-'.join(str(size) for size in sizes(context, name))}, QN = {net.num_outputs}, K = {len(net.theta):,}, "
        f"rank D = {net.rank}, σ_max/σ_min = {net.condition:.0f}"
        for name, net in context.nets.items()
    ]


def sizes(context: Context, name: str) -> list[int]:
    """Units of the layers of a network."""
    weights = [p for p in context.nets[name].model.parameters() if p.ndim == 2]
    return [weights[0].shape[1], *(weight.shape[0] for weight in weights)]


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    cells = [HEADER, *(row.cells for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def markdown(rows: Sequence[Row], run: Sequence[str], command: str) -> str:
    """The table as a page.

    Args:
        rows: The rows.
        run: What was run, a line each.
        command: What prints it again.
    """
    head = [
        "# The paper, claim by claim",
        "",
        f"Printed by `{command}` in float64 on real digits. An error is relative to the size of",
        "what is compared; its bound is what rounding, finite differences or the integrator's tolerance explain. For a formula",
        "as printed the error is how far it is off, and the row passes if that is more than the bound says and the corrected",
        "formula holds on the same numbers.",
        "",
        *(f"- {line}" for line in run),
        "",
        "| " + " | ".join((*HEADER[:-1], "verdict")) + " |",
        "|" + "---|" * len(HEADER),
    ]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |" for row in rows]
    return "\n".join([*head, *lines]) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=seed, default=0, help="of everything random (0)")
    add("--smoke", action="store_true", help="a run of seconds: 12 samples, width 16, rtol 1e-7")
    add("--samples", type=positive, default=24, help="images, N (24)")
    add("--width", type=positive, default=48, help="units of each of the two hidden layers (48)")
    add("--rtol", type=above_zero, default=1e-8, help="relative tolerance of flows (1e-8)")
    add("--markdown", type=Path, metavar="FILE", help="write the table as a page of documentation")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    parser = build_parser()
    options = parse(parser, arguments, {"samples": 12, "width": 16, "rtol": 1e-7})
    began = time.perf_counter()
    with errors_in_one_line(parser):
        if options.samples < 12:
            raise ValueError("--samples should be at least 12, for a class to have two images.")
        if options.markdown is not None and not options.markdown.parent.is_dir():
            raise NotADirectoryError(f"--markdown {options.markdown}: there is no folder {options.markdown.parent}.")
        context = build(options.samples, options.width, options.rtol, options.seed)
        run = describe(context)
        print("\n".join(run), end="\n\n", flush=True)
        rows = list(rows_of(context))
        print(text_table(rows))
        command = f"python recipes/paper/check.py{' --smoke' * options.smoke}"
        if options.markdown is not None:
            options.markdown.write_text(markdown(rows, run, command))
            print(f"wrote {options.markdown}")
    failed = [row.equation for row in rows if not row.passed]
    seconds = time.perf_counter() - began
    print(
        f"\n{len(rows) - len(failed)} of {len(rows)} rows pass in {seconds:.0f} s{': FAIL ' * bool(failed)}{', '.join(failed)}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
