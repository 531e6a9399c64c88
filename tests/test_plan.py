"""Plans: which kernel, tile, grid and memory a problem gets, on devices that need not be here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anyattn import launch, plan, wgmma
from anyattn.plan import Device, UnsupportedError
from anyattn.problem import ITEMSIZE, BackwardProblem, Options, Problem, View, backward, dense, row_major, varlen

HOPPER = Device("sm_90a", plan.SHARED_BYTES["sm_90a"])
ADA = Device("sm_89", plan.SHARED_BYTES["sm_89"])


def problem(
    dtype: str = "bfloat16", head_dim: int = 64, seqlen: int = 300, heads: int = 3, **options: object
) -> Problem:
    shape = (2, seqlen, heads, head_dim)
    view = View(0, shape, (seqlen * heads * head_dim, heads * head_dim, head_dim, 1), dtype, 0)
    return dense(view, view, view, None, Options(**options))  # type: ignore[arg-type]


def gradients(of: Problem) -> BackwardProblem:
    strides = of.out_strides
    array = View(0, of.out_shape, (strides[0], strides[2], strides[1], strides[3]), of.dtype, 0)
    return backward(of, array, array, View(0, of.lse_shape, of.lse_strides, of.lse_dtype, 0))


def constants(kernel: plan.Kernel) -> dict[str, int | bool | str]:
    return dict(kernel.spec.constants)


def test_params_is_the_struct_of_the_kernels() -> None:
    """Field by field: names, order and types of launch.PARAMS and of cuda_src/params.cuh."""
    text = (Path(__file__).parent.parent / "cuda_src" / "params.cuh").read_text()
    body = re.sub(r"//.*", "", text[text.index("struct Params {") + len("struct Params {") :])
    sizes = {"long long": 8, "unsigned long long": 8, "double": 8, "unsigned": 4, "int": 4, "Strides": 32}
    fields = []
    for declaration in body[: body.index("}")].split(";")[:-1]:
        kind, names = re.fullmatch(
            r"\s*(?:const )?((?:unsigned )?(?:long long|\w+))(\W.*)", declaration, re.DOTALL
        ).groups()  # type: ignore[union-attr]
        fields += [(name.strip(" *\n"), 8 if "*" in names else sizes[kind]) for name in names.split(",")]
    assert fields == [(name, launch.PARAMS[name].itemsize) for name in launch.PARAMS.names or ()]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("head_dim", [1, 16, 33, 64, 96, 128, 200, 256])
def test_every_head_dim_has_a_forward_kernel(dtype: str, head_dim: int) -> None:
    for device in (HOPPER, ADA):
        (kernel,) = plan.forward(problem(dtype, head_dim), device).kernels
        assert kernel.shared_bytes <= device.shared_bytes
        assert constants(kernel)["HEAD_DIM"] == head_dim


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("head_dim", [1, 64, 128, 256])
def test_backward_workspace_is_linear(dtype: str, head_dim: int) -> None:
    small, large = (plan.backward(gradients(problem(dtype, head_dim, n)), HOPPER) for n in (4096, 8192))
    hopper = {64: "backward_narrow_sm90", 128: "backward_sm90", 256: "backward_wide_sm90"}
    main = (hopper if ITEMSIZE[dtype] == 2 else {}).get(head_dim, "backward_sm80")
    assert [kernel.name for kernel in large.kernels] == ["backward_delta", main, "backward_dq"]
    counter = 256 if main in ("backward_narrow_sm90", "backward_sm90") else 0  # of tiles, with what aligns it
    assert (small.workspace_bytes - counter) * 2 == large.workspace_bytes - counter


def test_delta_lies_in_dq() -> None:
    """It takes no memory of its own, but where dq is too small: short rows, or few on Hopper, which pads them."""
    for head_dim, seqlen, apart in ((1, 300, True), (2, 300, False), (64, 1, True), (64, 300, False), (256, 64, False)):
        chosen = plan.backward(gradients(problem(head_dim=head_dim, seqlen=seqlen)), HOPPER)
        assert (chosen.delta_bytes > 0) == apart
    chosen = plan.backward(gradients(problem(head_dim=128, seqlen=8192)), HOPPER)
    assert chosen.workspace_bytes == chosen.dq_accum_bytes + chosen.ticket_bytes


def test_wide_hopper_backward() -> None:
    """A block of keys takes two thread blocks: one for dK and dQ, one for dV.

    Above 192 columns; and above 128 with dropout or a softcap, or if only V has as many.
    """
    for of in (
        problem(head_dim=136, dropout=0.1),
        problem(head_dim=192, softcap=5.0),
        replace(problem(head_dim=128), head_dim_v=192),
        problem(head_dim=200),
        problem(head_dim=256),
    ):
        _, main, _ = plan.backward(gradients(of), HOPPER).kernels
        assert main.name == "backward_wide_sm90"
        assert main.grid == 2 * -(-300 // 128) * 3 * 2
        assert main.shared_bytes <= HOPPER.shared_bytes
    _, main, _ = plan.backward(gradients(problem(head_dim=128)), HOPPER).kernels
    assert main.grid == -(-300 // 128) * 3 * 2


def test_hopper_backward_to_192() -> None:
    """Blocks of 96 keys, whose dK and dV a thread block holds both; a narrow V leaves room for a second block of dO."""
    for head_dim, head_dim_v, stages in ((136, 136, 1), (160, 160, 1), (192, 192, 1), (192, 128, 2), (192, 64, 2)):
        bp = gradients(replace(problem(head_dim=head_dim), head_dim_v=head_dim_v))
        _, main, _ = plan.backward(bp, HOPPER).kernels
        assert constants(main)["DOUT_STAGES"] == stages
        assert main.name == "backward_192_sm90"
        assert main.grid == -(-300 // 96) * 3 * 2
        assert main.shared_bytes <= HOPPER.shared_bytes


def test_narrow_hopper_backward() -> None:
    """Of 33 to 64 columns consumers take blocks of rows in turn, unless dropout or a softcap needs their registers."""
    for options, name in (
        ({}, "backward_narrow_sm90"),
        ({"head_dim": 40}, "backward_narrow_sm90"),
        ({"head_dim": 32}, "backward_sm90"),
        ({"causal": True, "scale": -1.0}, "backward_narrow_sm90"),
        ({"dropout": 0.1}, "backward_sm90"),
        ({"softcap": 5.0}, "backward_sm90"),
    ):
        _, main, _ = plan.backward(gradients(problem(**options)), HOPPER).kernels  # type: ignore[arg-type]
        assert main.name == name
        assert main.shared_bytes <= HOPPER.shared_bytes


def test_hopper_backward_to_128() -> None:
    """One consumer takes all of a block's dQ: its columns are whole products, and it has one ticket."""
    for options in ({"head_dim": 96}, {"head_dim": 128}, {"head_dim": 24, "dropout": 0.1}):
        chosen = plan.backward(gradients(problem(**options)), HOPPER)  # type: ignore[arg-type]
        main, blocks = chosen.kernels[1], -(-300 // 64) * 3 * 2
        assert (main.name, constants(main)["READERS"]) == ("backward_sm90", 2)
        assert chosen.dq_accum_bytes == blocks * 64 * -(-options["head_dim"] // 16) * 16 * 4
        assert chosen.ticket_bytes == 256
        assert main.shared_bytes <= HOPPER.shared_bytes


def decode(batch: int = 2, rows: int = 1, keys: int = 4096, heads_kv: int = 2, **options: Any) -> Problem:
    """Few rows of 8 heads that see many keys."""
    shapes = (batch, rows, 8, 128), (batch, keys, heads_kv, 128)
    q, k = (View(0, shape, row_major(shape), "bfloat16", 0) for shape in shapes)
    return dense(q, k, k, None, Options(**options))


def test_heads_that_share_keys_become_rows() -> None:
    rows = plan.heads_as_rows(decode(causal=True))
    assert (rows.heads, rows.heads_kv, rows.seqlen_q) == (2, 2, 4)
    assert rows.q_strides == (8 * 128, 4 * 128, 128, 1)
    assert rows.out_strides == (8 * 128, 4 * 128, 128, 1)
    assert rows.lse_strides == (8, 4, 1)
    for other in (
        decode(window=(100, 0)),  # rows at other positions would see other keys
        decode(dropout=0.1),
        replace(decode(), alibi=True),
        replace(decode(), varlen=True),
        decode(rows=2),
        decode(heads_kv=8),
        replace(decode(), heads=0, heads_kv=0),
    ):
        assert plan.heads_as_rows(other) is other


def test_few_rows_share_their_keys_among_thread_blocks() -> None:
    chosen = plan.forward(decode(), HOPPER)
    main, combine = chosen.kernels
    assert (main.name, combine.name) == ("forward_sm80", "forward_combine")
    assert (main.grid, combine.grid) == (2 * 2 * chosen.parts, 2 * 2 * 4)
    assert chosen.parts == 4096 // 256
    assert constants(main)["PARTED"]
    assert chosen.workspace_bytes == 16 * chosen.parts * (128 + 2) * 4
    long = plan.forward(decode(keys=2**20), HOPPER)
    assert long.parts == HOPPER.multiprocessors * 5 // 4  # as many as there is room for
    windowed = plan.forward(decode(window=(300, 0)), HOPPER)
    assert windowed.parts == 1  # of few keys
    assert windowed.workspace_bytes == 0
    for alone in (decode(keys=1023), decode(batch=200)):
        assert [kernel.name for kernel in plan.forward(alone, HOPPER).kernels] == ["forward_sm80"]
    for empty in (decode(batch=0), decode(rows=0), replace(decode(), heads=0, heads_kv=0), decode(batch=0, rows=4096)):
        for device in (HOPPER, ADA):
            assert plan.forward(empty, device).kernels == ()


def test_packed_rows_that_share_keys() -> None:
    """The workspace is for the rows that there can be, however large the array that holds them."""
    rows, keys, cu = (4, 8, 128), (9000, 2, 128), View(0, (3,), (1,), "int32", 0)
    q, k = (View(0, shape, row_major(shape), "bfloat16", 0) for shape in (rows, keys))
    packed = varlen(q, k, k, cu, cu, 2, 8000, None, Options())
    chosen = plan.forward(packed, HOPPER)
    assert chosen.parts > 1
    assert chosen.o_parts_bytes == 4 * 8 * chosen.parts * 128 * 4
    spare = plan.forward(replace(packed, total_q=500), HOPPER)
    assert (spare.parts, spare.workspace_bytes) == (chosen.parts, chosen.workspace_bytes)


def test_hopper_takes_rows_that_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, small = (
        "for so few rows it is faster that thread blocks share the keys",
        "smaller tiles are faster for so few rows",
    )
    few = [(decode(rows=n, heads_kv=8), small) for n in (1, 16)] + [
        (decode(rows=n, heads_kv=8), shared) for n in (17, 256)
    ]
    few += [(decode(rows=64, keys=128), small)]
    many = [decode(rows=257), decode(rows=17, keys=2047), decode(rows=17, window=(1500, 0)), decode(rows=17, batch=5)]
    many += [decode(rows=65, keys=128), decode(rows=64, keys=129), replace(decode(rows=64, keys=128), head_dim=136)]
    for of, reason in few:
        chosen = plan.forward(of, HOPPER)
        assert chosen.kernels[0].name == "forward_sm80"
        assert chosen.refused == (("sm90", reason),)
    for of in many:
        assert [kernel.name for kernel in plan.forward(of, HOPPER).kernels] == ["forward_sm90"]
    monkeypatch.setenv("ANYATTN_KERNEL", "sm90")
    for of, _ in few:
        assert plan.forward.__wrapped__(of, HOPPER).kernels[0].name == "forward_sm90"


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"sm80 kernels: float64 with head dim 256 needs \d+ bytes.*sm_89"):
        plan.backward(gradients(problem("float64", 256)), ADA)


def test_grid_covers_every_row() -> None:
    (kernel,) = plan.forward(problem(seqlen=300, heads=3), ADA).kernels
    assert kernel.grid == -(-300 // int(constants(kernel)["BLOCK_M"])) * 3 * 2
    assert plan.forward(problem(seqlen=0), HOPPER).kernels == ()


def test_more_blocks_than_a_launch_may_have() -> None:
    with pytest.raises(UnsupportedError, match="thread blocks"):
        plan.forward(replace(problem(), batch=2**31), HOPPER)


def test_features_are_compiled_in_only_where_asked_for() -> None:
    plain = constants(plan.forward(problem(causal=True, window=(5, 0)), HOPPER).kernels[0])
    assert not any(plain[name] for name in ("SOFTCAP", "DROPOUT", "ALIBI", "VARLEN", "SIGNED_SCALE"))
    capped = constants(plan.forward(problem(softcap=5.0, dropout=0.1, scale=-1.0), HOPPER).kernels[0])
    assert all(capped[name] for name in ("SOFTCAP", "DROPOUT", "SIGNED_SCALE"))


def test_kernel_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_KERNEL", "sm80")
    assert plan.forward.__wrapped__(problem(), HOPPER).kernels[0].name == "forward_sm80"
    monkeypatch.setenv("ANYATTN_KERNEL", "sm70")
    with pytest.raises(UnsupportedError, match="ANYATTN_KERNEL must be one of sm90, sm80, got 'sm70'"):
        plan.forward.__wrapped__(problem(), HOPPER)


def test_hopper_kernels_stay_for_many_tiles() -> None:
    """A thread block for each multiprocessor; they count the tiles whose lengths are known on the GPU only."""
    assert plan.forward(problem(seqlen=300, heads=3), HOPPER).kernels[0].grid == 3 * 3 * 2
    assert plan.forward(problem(seqlen=300, heads=3000), HOPPER).kernels[0].grid == HOPPER.multiprocessors
    packed = replace(problem(heads=3000), varlen=True, total_q=600, total_k=600)
    chosen = plan.forward(packed, HOPPER)
    assert chosen.kernels[0].grid == HOPPER.multiprocessors
    assert chosen.workspace_bytes == 4
    main = plan.backward(gradients(problem(seqlen=300, heads=3000)), HOPPER).kernels[1]
    assert main.grid == HOPPER.multiprocessors


def test_whoever_may_share_keys_is_built_both_ways() -> None:
    for arch in plan.SHARED_BYTES:
        built: dict[tuple[tuple[str, object], ...], set[object]] = {}
        for spec in plan.default_specs(arch):
            if spec.source == "forward_sm80.cu":
                rest = tuple(item for item in spec.constants if item[0] != "PARTED")
                built.setdefault(rest, set()).add(dict(spec.constants)["PARTED"])
        assert built
        assert all(ways == {False, True} for ways in built.values())


def test_registers_change_hands_within_what_a_block_starts_with() -> None:
    """setmaxnreg waits for registers that others of the thread block have released; there are no more."""
    specialised = [spec for spec in plan.default_specs("sm_90a") if "CONSUMER_REGISTERS" in dict(spec.constants)]
    specialised += [
        plan.backward(gradients(problem(head_dim=d, dropout=0.1)), HOPPER).kernels[1].spec for d in (64, 128, 256)
    ]
    assert specialised
    for spec in specialised:
        known = dict(spec.constants)
        consumers = int(known.get("CONSUMERS", 2))
        threads = 128 * (1 + consumers)
        at_start = min(2**16 // threads // 8 * 8, 255) * (1 + consumers)
        assert int(known["PRODUCER_REGISTERS"]) + consumers * int(known["CONSUMER_REGISTERS"]) <= at_start


def test_order_of_tiles() -> None:
    """Tiles of as many heads as fill two rounds or 8 MiB of K and V; without a counter, only where they are unlike."""
    sections = {
        seqlen: plan.forward(problem(head_dim=128, heads=512, seqlen=seqlen, causal=True), HOPPER).section
        for seqlen in (512, 4096, 16384)
    }
    assert sections == {512: 32, 4096: 4, 16384: 1}
    assert plan.forward(problem(head_dim=64, heads=512, seqlen=4096), HOPPER).section == 8
    assert plan.forward(problem(head_dim=256, heads=512, seqlen=4096, causal=True), HOPPER).section == 8
    assert plan.forward(problem(head_dim=256, heads=512, seqlen=4096), HOPPER).section == 1
    assert plan.forward(problem(head_dim=256, heads=512, seqlen=512, causal=True), HOPPER).section == 1


def test_counter_of_tiles() -> None:
    """One only where thread blocks have more than one tile, and a second stage for Q."""
    assert plan.forward(problem(head_dim=128, seqlen=512), HOPPER).ticket_bytes == 0
    assert plan.forward(problem(head_dim=128, heads=512, seqlen=512), HOPPER).ticket_bytes == 4
    assert plan.forward(problem(head_dim=256, heads=512, seqlen=512), HOPPER).ticket_bytes == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "take float16 and bfloat16, not float32"),
        ({"align": 8}, "at multiples of 16 bytes"),
        ({"k_strides": (300 * 192, 64, -192, 1)}, "k has a negative stride"),
        ({"v_strides": (300 * 192, 64, 0, 1)}, "v repeats one row"),
        ({"q_strides": (2**39, 64, 192, 1)}, r"q has a stride of 2\*\*40 bytes or more"),
    ],
)
def test_what_the_hopper_kernel_leaves_to_the_portable_one(change: dict[str, object], reason: str) -> None:
    assert plan.forward(problem(), HOPPER).refused == ()
    chosen = plan.forward(replace(problem(), **change), HOPPER)  # type: ignore[arg-type]
    assert chosen.kernels[0].name == "forward_sm80"
    ((family, why),) = chosen.refused
    assert family == "sm90"
    assert re.search(reason, why)
    (refused,) = plan.forward(problem(), ADA).refused
    assert refused == ("sm90", "they are for Hopper GPUs (sm_90a), this one is sm_89")


def test_wgmma_names_every_register() -> None:
    text = wgmma.functions("bfloat16", (8, 16, 16))
    assert text.count("m64n8k16.f32.bf16.bf16") == text.count("m64n16k16.f32.bf16.bf16") == 2
    shared, registers = text.split("template")[3:]
    assert "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %11, %12;" in shared
    assert "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, %15;" in registers
    for width in (4, 12, 264):
        with pytest.raises(ValueError, match="from 8 to 256 columns wide"):
            wgmma.functions("float16", (width,))


def test_own_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "tiles.yaml"
    tile = "{head_dim: 64, BLOCK_M: 64, BLOCK_N: 32, WARPS: 4, MIN_BLOCKS: 1, V_PARTS: 1}"
    table.write_text(f"forward_sm80:\n  16-bit:\n    - {tile}\n")
    monkeypatch.setenv("ANYATTN_TILES", str(table))
    monkeypatch.setattr(plan, "_tiles", plan._tiles.__wrapped__)
    assert constants(plan.forward.__wrapped__(problem(), HOPPER).kernels[0])["BLOCK_N"] == 32
    with pytest.raises(UnsupportedError, match="none for bfloat16 with head dim 128"):
        plan.forward.__wrapped__(problem(head_dim=128), HOPPER)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forward_sm80:\n  16-bit: {]\n", "no table of tiles.*, line 2"),
        ("", "no table of tiles"),
        ("[]", "no table of tiles"),
        ("forward_sm80: 3", "no table of tiles"),
        ("forward_sm80:\n  16-bit:\n    - {BLOCK_M: 64}", "no table of tiles.*head_dim"),
        ("forward_sm80:\n  16-bit:\n    - {head_dim: wide}", "no table of tiles.*head_dim is not an int"),
        (None, "can't be read"),
    ],
)
def test_malformed_tiles_are_named(
    text: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "mine.yaml"
    if text is not None:
        table.write_text(text)
    monkeypatch.setenv("ANYATTN_TILES", str(table))
    with pytest.raises(UnsupportedError, match=rf"(?s)mine\.yaml \(ANYATTN_TILES\) .*{message}"):
        plan._tiles.__wrapped__()


def test_only_the_first_process_parses_the_tiles(tmp_path: Path) -> None:
    script = "import sys; from anyattn import plan; assert plan._tiles(); print('yaml' in sys.modules)"
    environment = {**os.environ, "ANYATTN_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", script]
    printed = [subprocess.run(command, env=environment, check=True, stdout=-1, text=True).stdout for _ in range(2)]
    assert printed == ["True\n", "False\n"]
