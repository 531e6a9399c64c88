"""The kernels on the emulator (`tests.emulator`): some cases of the shared table, and that it sees what is wrong.

EMULATE=all runs the whole table, in every dtype and with every timing, for an hour or so; so does, in parts,
`python -m tests.emulator`.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from anyattn import compile as compiler
from anyattn import plan
from anyattn.compile import Spec
from tests.cases import BY_NAME, CASES, DTYPES, Case, Inputs, Results, check
from tests.device import Call, Job
from tests.emulator import build
from tests.emulator.device import DEVICE, EmulationError, Timing, emulated
from tests.emulator.translate import translate
from tests.test_hard_use import check_alike_scores
from tests.test_hidden import check_hidden

pytestmark = pytest.mark.skipif(
    build.find_compiler() is None, reason="the emulator needs a C++ compiler: $CXX, g++, clang++ or c++"
)


@dataclass(frozen=True)
class Emulation:
    """A job on the emulator."""

    job: Job
    timing: Timing = Timing.RANDOM
    family: str | None = None
    multiprocessors: int = 2  # as few, so that a block works on many tiles

    def __str__(self) -> str:
        return "-".join([str(self.job), *filter(None, [self.family]), self.timing.name.lower()])

    def specs(self) -> list[Spec]:
        with emulated(family=self.family):
            return self.job.specs()

    def run(self, seed: int = 0, sources: Path | None = None) -> Results:
        device = DEVICE._replace(multiprocessors=self.multiprocessors)
        with emulated(self.timing, seed, device, self.family, sources):
            call = Call(self.job.inputs(), self.job.deterministic)
            call.forward()
            call.backward()
            return call.results()


def _named(part: str, dtype: str, timing: Timing, family: str | None = None, deterministic: bool = False) -> Emulation:
    (case,) = (case for case in CASES if part in case.name)
    return Emulation(Job(case, dtype, deterministic), timing, family)


EARLY, LATE, RANDOM = Timing
LONGER = Case("longer", 1, 2, 1, seqlen_q=430, seqlen_k=500, head_dim=128, head_dim_v=128, causal=True)
SELECTED = [
    Emulation(Job(LONGER, "bfloat16"), LATE),
    _named("half_a_tile_both", "float16", EARLY),
    _named("varlen_uneven", "bfloat16", LATE, deterministic=True),
    _named("left-alibi-dropout-mqa-bhsd3-transposed-300x300x32", "bfloat16", RANDOM, deterministic=True),
    _named("full-softcap-alibi_bh-gqa-bshd3-transposed-127x300x80", "bfloat16", RANDOM),
    _named("narrow_causal-gqa-bhsd3-padded_rows-128x65x256", "float16", LATE),
    _named("window-alibi-gqa-varlen-contiguous-192x192x192", "bfloat16", LATE, deterministic=True),
    _named("rows_that_see_nothing", "bfloat16", RANDOM),
    _named("varlen_uneven", "float16", RANDOM, "sm80"),
    _named("full-softcap-alibi_bh-dropout-mha-bhsd-contiguous-scaled-65x128x37", "bfloat16", LATE, "sm80"),
    _named("window-alibi_bh-mha-varlen-misaligned-300x63x24", "float32", RANDOM, deterministic=True),
    _named("causal-alibi-dropout-mha-bhsd-contiguous-63x127x64", "float64", LATE),
]
WHOLE = [
    Emulation(Job(case, dtype, deterministic), timing, family)
    for case, dtype, timing, deterministic in itertools.product(CASES, DTYPES, Timing, (False, True))
    for family in ((None, "sm80") if DTYPES[dtype].itemsize == 2 else (None,))
]


@pytest.fixture(scope="session", autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    """The kernels of every selected test, built side by side."""
    if build.find_compiler() is None:
        return
    emulations = {item.callspec.params.get("emulation") for item in request.session.items if hasattr(item, "callspec")}
    specs = {spec for emulation in emulations - {None} for spec in emulation.specs()}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        built = [pool.submit(build.machine), *(pool.submit(build.kernel, spec) for spec in specs)]
    for future in built:
        future.result()


@pytest.mark.parametrize("emulation", WHOLE if os.environ.get("EMULATE") == "all" else SELECTED, ids=str)
def test_table(emulation: Emulation) -> None:
    check(emulation.job.case, emulation.job.dtype, emulation.job.inputs(), emulation.run())


@pytest.mark.parametrize("emulation", [x for x in SELECTED if x.job.deterministic], ids=str)
def test_deterministic_whatever_the_order(emulation: Emulation) -> None:
    first, second = (replace(emulation, timing=RANDOM, multiprocessors=n).run(n) for n in (1, 4))
    for name, x in vars(first).items():
        assert np.array_equal(x, getattr(second, name)), name


def test_threads_that_never_used_the_gpu() -> None:
    """Forward here, backward elsewhere, as PyTorch's autograd does."""
    job = Job(BY_NAME["dim64"], "bfloat16")
    inputs = job.inputs()
    with emulated():
        call = Call(inputs)
        call.forward()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(call.backward).result()
        check(job.case, job.dtype, inputs, call.results())


@pytest.mark.parametrize("head_dim", [128, 192])
def test_hidden_values(head_dim: int) -> None:
    """NaN and inf that a mask hides, on the kernels' careful paths."""
    band = Case("band", 1, 2, 1, seqlen_q=70, seqlen_k=140, window=(37, 20))
    case = replace(band, head_dim=head_dim, head_dim_v=head_dim)

    def compute(inputs: Inputs) -> Results:
        with emulated(RANDOM, device=DEVICE._replace(multiprocessors=2)):
            call = Call(inputs)
            call.forward()
            call.backward()
            return call.results()

    check_hidden(case, "bfloat16", compute)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parts_weigh_by_their_sums(dtype: str) -> None:
    def compute(case: Case, inputs: Inputs) -> Results:
        device = DEVICE._replace(multiprocessors=8)
        with emulated(RANDOM, device=device):
            call = Call(inputs)
            assert plan.forward(call.bp.problem, device).parts > 1
            call.forward()
            call.backward()
            return call.results()

    check_alike_scores(dtype, compute)


# --- planted faults --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A change of the sources, and what the emulator says of it: an error's text, or the output that is wrong."""

    name: str
    before: str
    after: str
    message: str
    timing: Timing = Timing.RANDOM


FAULTS = [
    Fault("no_arrival", "if (threadIdx.x % 32 == 0) empty(stage).arrive();", "", "deadlock(.|\n)*at an mbarrier"),
    Fault("wrong_bytes", "ring.expect(TileK::BYTES)", "ring.expect(TileK::BYTES + 16)", "16 bytes to come"),
    Fault("two_arrivals", "full.arrive_and_expect(bytes);", "full.arrive_and_expect(bytes), full.arrive();", "than 1"),
    Fault("released_too_early", "k_stages().init(4 * CONSUMERS)", "k_stages().init(1)", "has yet to read|deadlock"),
    Fault("divergence", "__syncwarp();\n    if", "if (threadIdx.x % 2) __syncwarp();\n    if", "deadlock|diverge"),
    Fault("uninitialised", "shared.v_stages().init(4 * CONSUMERS);", "", "not initialised"),
    Fault("no_wait_for_a_load", "    k_ring.wait();\n    pin", "    pin", "into which a load is on its way", LATE),
    Fault("no_wait_for_scores", "wgmma_wait<1>();\n    finish_", "finish_", "before it was waited for"),
    Fault("no_wait_for_products", "wgmma_wait<0>();\n    pin(o[0]);", "pin(o[0]);", "before it was waited for"),
    Fault("no_register_fence", "    pin(probs);\n    wgmma_fence();", "    pin(probs);", "without a wgmma.fence"),
    Fault("no_fence_for_others", "fence_async_shared();  // for its writers, too", "//", "without fence.proxy.async"),
    Fault("no_proxy_fence", "fence_async_shared();  // before Q comes here again", "", "without fence.proxy.async"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_sees(fault: Fault, tmp_path: Path) -> None:
    sources = tmp_path / "cuda_src"
    shutil.copytree(compiler._source_dir(), sources)
    found = 0
    for path in (*sources.rglob("*.cu"), *sources.rglob("*.cuh")):
        text = path.read_text(encoding="utf-8")
        found += text.count(fault.before)
        path.write_text(text.replace(fault.before, fault.after), encoding="utf-8")
    assert found == 1
    emulation = Emulation(Job(LONGER, "bfloat16"), fault.timing, multiprocessors=1)
    with pytest.raises((EmulationError, AssertionError), match=fault.message):
        check(LONGER, "bfloat16", emulation.job.inputs(), emulation.run(sources=sources))


# --- translation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assembly", "expected"),
    [
        ('asm volatile("" : "+r"(x));', ";"),
        (
            'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(a[f(0, 1)]), "f"(low));',
            "ptx::cvt_rn_f16x2_f32((word), (a[f(0, 1)]), (low));",
        ),
        (
            'asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x), "=f"(y) : "r"(from) : "memory");',
            "ptx::ld_shared_v2_f32(ptx::registers((x), (y)), (from));",
        ),
        (
            'asm volatile("a.b::c.m64n128k16 [%0, {%1, %2}], 1;" ::"r"(d),\n "r"(x), "n"(Y));',
            "ptx::a_b_c_m64k16<128>((d), ptx::list((x), (Y)), 1)\n;",
        ),
        (
            'asm("{.reg .pred p; a: try.x p, %0, 0f3f800000; @!p bra a;}" ::"r"(x));',
            "do { bool p; a: ptx::try_x(p, (x), __uint_as_float(0x3f800000u)); if (!p) goto a; } while (false);",
        ),
    ],
)
def test_translate(assembly: str, expected: str) -> None:
    assert translate(assembly) == expected
