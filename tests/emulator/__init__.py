"""The CUDA kernels without a GPU: their sources, compiled for the CPU, run thread by thread.

    python -m tests.emulator -k causal --dtype bfloat16

runs cases of the table on the kernels that a Hopper GPU would get. `translate` turns inline assembly into calls,
`build` compiles a kernel with a C++ compiler, `machine/` is the GPU, `device` puts it in the place of CuPy's, below
`anyattn.launch`: planning, parameters and tensor maps are the package's own.

What the machine does as a GPU does: thread blocks side by side, warps in any order, warp collectives, named barriers,
mbarriers with byte counts, TMA loads through tensor maps, bulk stores and reductions, wgmma with its descriptors,
mma, ldmatrix, stmatrix, cp.async, atomics. A warp is late now and then, and what runs in the background is as early or
as late as it may be (`Timing`), or comes at a random moment. `--seed` leads to other orders.

What it reports: deadlocks, with the place of every warp; lanes that diverge at a collective; barriers that are not
initialised or get too many arrivals; shared memory that is read while a load is on its way into it, or overwritten
while wgmma or a bulk store has yet to read it; what TMA or wgmma take without a fence.proxy.async, by the writer or by
a thread that it told of it through an mbarrier; accumulators and A registers that change in flight (and who reads them
gets NaN); bulk copies, atomics and cp.async outside of the arrays; wrong alignment. Shared memory starts as NaN. (A
write of what stands there already is no fault: two warpgroups may clear the same rows, one after the other.) Each comes
with the source lines that led to it.

What it can't show: time; registers and spills; whether the compiler serialises wgmma; bank conflicts; the weak order of
plain accesses, within a block or between blocks (each is done at once, for all to see); plain accesses to global memory
outside of the arrays, but for what the guard bands of `tests.device.Memory` tell; how tensor cores round.
"""
