"""Runs cases and checks in several processes, and writes what they came to.

A clean process forks the others, which takes a tenth of a second, and runs all cases in each.
"""

import copy
import datetime
import os
import signal
import sys
import tempfile
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist

from . import CASES, CHECKS, SIZE

FIELDS = ("status", "num_trials", "rank", "num_outputs", "num_calls", "relative_damping", "fraction", "curvature", "space")


def outcome_of(name, rank, size):
    """θ after each step, what the reports said, and the state."""
    thetas, reports, model, optimizer = [], [], None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for model, optimizer in CASES[name](rank, size):
                thetas.append(torch.cat([p.detach().double().reshape(-1) for p in model.parameters()]))
                reports.append({field: getattr(optimizer.last_step, field) for field in FIELDS})
        except pytest.skip.Exception:  # something is not installed
            return None
    return {
        "theta": torch.stack(thetas),
        "reports": reports,
        "state": copy.deepcopy(optimizer.state_dict()),
        "double": next(model.parameters()).dtype == torch.float64,
    }


def in_processes(work, size, timeout=60):
    """Fork processes that work on something and give what each came to, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    torch.set_num_threads(1)
                    dist.init_process_group(
                        "gloo",
                        init_method=f"file://{folder}/store",
                        rank=rank,
                        world_size=size,
                        timeout=datetime.timedelta(seconds=timeout),
                    )
                    torch.save(work(rank, size), f"{folder}/{rank}.pt")
                    dist.barrier()
                    dist.destroy_process_group()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            children.append(child)
        codes = {}
        while len(codes) < size:
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:
                for other in set(children) - codes.keys():  # it would wait for the one that failed
                    os.kill(other, signal.SIGKILL)
        if any(codes.values()):
            raise RuntimeError(f"A process failed: {codes}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]


def checked(name, rank, size):
    """What a check found to be wrong; nothing if all is well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CHECKS[name](rank, size)
    except Exception:
        return traceback.format_exc()
    return ""


def main():
    """Run all cases and checks, or some, and write what they came to."""
    torch.set_num_threads(1)
    names = sys.argv[2:] or [*CASES, *CHECKS]

    def work(rank, size):
        found = {}
        for name in names:
            found[name] = outcome_of(name, rank, size) if name in CASES else checked(name, rank, size)
            dist.barrier()
        return found

    together = in_processes(work, SIZE)
    alone = {name: outcome_of(name, 0, 1) for name in names if name in CASES}
    torch.save({"alone": alone, "together": together}, sys.argv[1])


if __name__ == "__main__":
    main()
