"""Run cases of the shared table on the emulator; for each output: the largest error and the largest allowed."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import sys
import time
from dataclasses import replace
from pathlib import Path

from anyattn.plan import UnsupportedError
from tests.cases import CASES, DTYPES, check, errors, expected, tolerances
from tests.device import Call, Job
from tests.emulator.device import DEVICE, Timing, emulated


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("--case", action="append", help="the name of a case; may be given again")
    parser.add_argument("-k", metavar="PART", help="all cases whose names contain this; without either, all cases")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--family", choices=("sm90", "sm80"), help="of kernels, in place of the best")
    parser.add_argument("--timing", default="random", choices=[timing.name.lower() for timing in Timing])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from that one on")
    parser.add_argument("--multiprocessors", type=int, default=DEVICE.multiprocessors, help="resident thread blocks")
    parser.add_argument("--source", type=Path, help="a folder in place of the checkout's cuda_src")
    parser.add_argument("--forward", action="store_true", help="no backward pass")
    parser.add_argument("-j", type=int, default=1, help="processes")
    given = parser.parse_args()
    cases = [case for case in CASES if (case.name in given.case if given.case else not given.k or given.k in case.name)]
    if not cases:
        parser.error("no such case")
    jobs = [
        (Job(case, given.dtype, given.deterministic), seed)
        for seed in range(given.seed, given.seed + given.seeds)
        for case in cases
    ]
    failed = 0
    with concurrent.futures.ProcessPoolExecutor(given.j) as pool:
        for line, passed in pool.map(functools.partial(run, given), *zip(*jobs, strict=True)):
            print(line, flush=True)
            failed += not passed
    print(f"{failed} of {len(jobs)} failed" if failed else f"all {len(jobs)} passed")
    return failed > 0


def run(given: argparse.Namespace, job: Job, seed: int) -> tuple[str, bool]:
    """One line that says how it went, and whether well."""
    inputs, device = job.inputs(), DEVICE._replace(multiprocessors=given.multiprocessors)
    start = time.perf_counter()
    try:
        with emulated(Timing[given.timing.upper()], seed, device, given.family, given.source):
            call = Call(inputs, job.deterministic)
            call.forward()
            if not given.forward:
                call.backward()
            results = call.results()
    except UnsupportedError as error:
        return f"{job}: not supported: {error}", True
    except (RuntimeError, AssertionError) as error:
        return f"FAILED {job} seed {seed}: {error}", False
    seconds = time.perf_counter() - start
    if given.forward:
        results = replace(results, dq=None, dk=None, dv=None)
    exact = expected(job.case, inputs)
    found, bounds = errors(results, exact), tolerances(job.case, job.dtype, inputs, exact)
    shown = ", ".join(f"{name} {found[name]:.2g} of {bounds[name]:.2g}" for name in found)
    try:
        check(job.case, job.dtype, inputs, results)
    except AssertionError:
        return f"FAILED {job} seed {seed} ({seconds:.2f} s): {shown}", False
    return f"{job} seed {seed} ({seconds:.2f} s): {shown}", True


if __name__ == "__main__":
    sys.exit(main())
