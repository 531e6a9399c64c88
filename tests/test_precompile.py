"""What tests.precompile would compile."""

from __future__ import annotations

from anyattn import plan
from anyattn.plan import Device
from tests import precompile
from tests.device import Job


def test_every_kernel_of_the_suite() -> None:
    assert all(isinstance(job, Job) and kernels in ("", "sm80", "sm90") for job, kernels in precompile.jobs())
    specs = precompile.specs(Device("sm_90a", plan.SHARED_BYTES["sm_90a"]))
    assert len(specs) == len(set(specs))
    assert {spec.arch for spec in specs} == {"sm_90a"}
    every = {spec.source for spec in plan.default_specs("sm_90a")}
    assert {spec.source for spec in specs} == every
