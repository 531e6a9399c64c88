"""Compile the kernels of the GPU suite's jobs on a machine without a GPU: python -m tests.precompile --arch sm_90a

They go to $ANYATTN_CACHE. The suite finds them there if its NVRTC has the version of the one used here; what its other
tests need it compiles itself.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Iterator
from unittest import mock

from anyattn import compile as compiler
from anyattn import launch, plan
from anyattn.compile import Spec
from anyattn.plan import Device, UnsupportedError
from tests import test_api, test_gpu, test_hard_use, test_hidden
from tests.device import Job

MODULES = (test_gpu, test_hidden, test_hard_use, test_api)


def jobs() -> Iterator[tuple[Job, str]]:
    """Of all tests of MODULES that have one, with the family of kernels that it asks for."""
    for test in (value for module in MODULES for value in vars(module).values()):
        marks = getattr(test, "pytestmark", [])
        given = {mark.args[0]: mark.args[1] for mark in marks if mark.name == "parametrize"}
        yield from ((job, "") for job in given.get("job", ()))
        yield from given.get(("job", "kernels"), ())
        if any(mark.name == "gpu" for mark in marks):
            yield from ((Job(case, dtype), "") for case, dtype in given.get(("case", "dtype"), ()))


def specs(device: Device) -> list[Spec]:
    """Each once, those that take longest first."""
    found: set[Spec] = set()
    with mock.patch.object(launch, "device", return_value=device):
        for job, kernels in set(jobs()):
            with mock.patch.dict(os.environ, {"ANYATTN_KERNEL": kernels} if kernels else {}):
                launch.forget_plans()
                try:
                    found.update(job.specs())
                except UnsupportedError:
                    continue  # the test itself says so
    launch.forget_plans()
    return test_gpu.slow_first(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.precompile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", required=True, choices=list(plan.SHARED_BYTES))
    parser.add_argument("-j", type=int, default=os.cpu_count() or 1, help="processes")
    given = parser.parse_args()
    wanted = specs(Device(given.arch, plan.SHARED_BYTES[given.arch]))
    print(f"{len(wanted)} kernels to {compiler.cache_dir()}, NVRTC {'.'.join(map(str, compiler.nvrtc_version()))}")
    with concurrent.futures.ProcessPoolExecutor(given.j, multiprocessing.get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(compiler.cubin, wanted), 1):
            if done % 50 == 0:
                print(done, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
