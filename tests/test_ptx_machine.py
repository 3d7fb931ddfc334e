"""The machine that runs PTX sees the mistakes that it is there for: planted in a kernel, each of them raises."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from ptx_machine import Emulated, OutOfBoundsError, RaceError, TooEarlyError, run

from fp4bench.formats import MXFP4
from fp4bench.kernels import decode, prefill
from fp4bench.kernels.decode import DecodeConfig
from fp4bench.kernels.prefill_launch import PrefillConfig
from fp4bench.kernels.weights import prepare
from fp4bench.quantize import quantize

# --- Mistakes in a kernel ---------------------------------------------------------------------------------------------------


def without(pattern, number):
    """An edit: the number-th match of a pattern is gone."""

    def edit(text):
        match = list(re.finditer(pattern, text))[number]
        return text[: match.start()] + text[match.end() :]

    return edit


def launch(edit=lambda text: text, *, early=("words", "scales"), more=None):
    """A product through slots, x of 13 rows. more: an argument of the kernel that is one more than it should be."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 2048, generator=generator).bfloat16()
    weight = prepare(quantize(torch.randn(33, 2048, generator=generator), MXFP4))
    out = torch.full((13, 33), torch.nan, dtype=torch.bfloat16)
    grid, arguments, constants = decode._launch(x, weight, out, DecodeConfig(2, 4, slots=3), 1.0, None, True)
    arguments = list(arguments)
    if more:
        arguments[decode._decode.arg_names.index(more)] += 1
    Emulated(decode._decode, early=early, edit=edit)[grid](*arguments, **constants)
    return out


@pytest.mark.triton_3_6
@pytest.mark.parametrize(
    ("edit", "error", "why"),
    [
        (without(r"\bbar\.sync\s+0;", 0), RaceError, "reads is overwritten"),
        (without(r"\bbar\.sync\s+0;", -1), RaceError, "wrote is read"),
        (without(r"bar\.warp\.sync -1;", 0), RaceError, "wrote is read"),
        (without(r"bar\.warp\.sync -1;", 1), RaceError, "reads is overwritten"),
        (lambda text: text.replace("wait_group 2", "wait_group 3"), RaceError, "before it was waited for"),
        (without(r"griddepcontrol\.wait;", 0), TooEarlyError, "is read"),
    ],
    ids=["before the sums", "among the sums", "before a slot is read", "behind it", "a unit too young", "x too early"],
)
def test_a_barrier_or_a_wait_that_is_missing_is_seen(edit, error, why):
    assert not launch().isnan().any()
    with pytest.raises(error, match=why):
        launch(edit)


@pytest.mark.triton_3_6
@pytest.mark.parametrize("more", ["m", "tiles"])
def test_what_lies_behind_a_tensor_is_not_touched_unseen(more):
    with pytest.raises(OutOfBoundsError, match="no tensor holds"):
        launch(more=more)


@pytest.mark.triton_3_6
def test_what_is_read_early_has_to_be_named():
    with pytest.raises(TooEarlyError):
        launch(early=("words",))


SMS = 3  # so that a CTA has more steps than stages


def on_warpgroups(edit=lambda text: text):
    """A product by wgmma, of boxes that a warp of its own asks for; CTAs share tiles."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=generator).bfloat16()
    weight = prepare(quantize(torch.randn(256, 512, generator=generator), MXFP4))
    out, config = torch.full((64, 256), torch.nan, dtype=torch.bfloat16), PrefillConfig(columns=64)
    workspace = torch.zeros(prefill.workspace_bytes(64, weight, x.dtype, config, SMS), dtype=torch.uint8)
    grid, arguments, constants = prefill._launch(x, weight, out, config, workspace, None, 1.0, None, True, SMS)
    Emulated(prefill.wgmma_product, early=("words", "scales"), edit=edit)[grid](*arguments, **constants)
    return out


def less_of(pattern, number):
    """An edit: the number that a pattern ends with is less."""
    return lambda text: re.sub(rf"({pattern})(\d+)", lambda match: match[1] + str(int(match[2]) - number), text)


@pytest.mark.triton_3_6
@pytest.mark.parametrize(
    ("edit", "error", "why"),
    [
        (less_of(r"wgmma\.wait_group\.sync\.aligned\s+", -1), RaceError, "wgmma|overwritten"),
        (without(r"bar\.sync\s+0, 128;", 3), RaceError, "reads is overwritten"),
        (without(r"bar\.sync\s+0, 128;", 4), RaceError, "wrote is read"),
        (without(r"@%p\d+ mbarrier\.arrive\.shared::cta[^;]*;", 1), RuntimeError, "wait at barriers"),
        (less_of(r"expect_tx\.shared\.b64 _, \[%r\d+\], ", 256), RuntimeError, "wait at barriers"),
        (less_of(r"mbarrier\.init\.shared::cta\.b64 \[%r\d+\], ", 1), RaceError, "more threads arrive|not initialized"),
        (lambda text: text.replace("atom.global.gpu.acq_rel", "atom.global.gpu.relaxed"), RaceError, "another CTA writes"),
        (without(r"griddepcontrol\.wait;", 0), TooEarlyError, "is read"),
    ],
    ids=[
        "a product not waited for",
        "before sums are exchanged",
        "among the exchange",
        "a stage not given back",
        "fewer bytes than are brought",
        "fewer arrivals than come",
        "sums of others too early",
        "x too early",
    ],
)
def test_a_mistake_among_warpgroups_is_seen(edit, error, why):
    assert not on_warpgroups().isnan().any()
    with pytest.raises(error, match=why):
        on_warpgroups(edit)


# --- Single instructions ----------------------------------------------------------------------------------------------------


def run_text(body, *tensors, ctas=1, threads=64, shared=1024):
    """Statements on the addresses of tensors, in %rd0, %rd1, ..., the thread in %r0, its CTA in %r1, 4 times it in %rd9."""
    header = ", ".join(f".param .u64 .ptr .global .align 1 kernel_param_{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [kernel_param_{i}];" for i in range(len(tensors)))
    start = "mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd9, %r0, 4;"
    text = f".visible .entry kernel({header})\n.reqntid {threads}\n{{\n{loads}\n{start}\n{body}\nret;\n$L__func_end0:\n}}"
    run(text, shared, (ctas,), list(tensors))
    return tensors[0]


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)


STORE = "add.s64 %rd8, %rd0, %rd9; st.global.b32 [%rd8], {};"


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("mov.b32 %r2, 7; shl.b32 %r3, %r2, 33;", 0),
        ("mov.b32 %r2, -8; shr.s32 %r3, %r2, 40;", -1),
        ("mov.b32 %r2, -7; div.s32 %r3, %r2, 2;", -3),
        ("mov.b32 %r2, -7; rem.s32 %r3, %r2, 2;", -1),
        ("mov.b32 %r2, 0x01020304; bfe.u32 %r3, %r2, 8, 8;", 3),
        ("mov.b32 %r2, 0x0102F304; bfe.s32 %r3, %r2, 8, 8;", -13),
        ("mov.b32 %r2, 0x01020304; prmt.b32 %r3, %r2, 0, 0x4440;", 4),
        ("mov.b32 %r2, 0f3FC00000; fma.rn.f32 %r3, %r2, %r2, %r2;", 0x40700000),  # 1.5 * 1.5 + 1.5 = 3.75
        ("mov.b32 %r2, 0f40490FDB; cvt.rn.bf16.f32 %rs1, %r2; mov.b32 %r3, {%rs1, %rs1};", 0x40494049),
        ("mov.b32 %r2, 0f3F800000; cvt.rn.bf16x2.f32 %r3, %r2, 0f40000000;", 0x3F804000),  # 1 is the upper half
        ("mov.b32 %r2, 0f7FC00000; setp.ne.f32 %p1, %r2, %r2; selp.b32 %r3, 1, 0, %p1;", 0),  # ordered: false of NaN
        ("setp.eq.s32 %p1, 1, 1; vote.sync.ballot.b32 %r2, %p1, -1; popc.b32 %r3, %r2;", 32),
        ("mov.b32 %r2, -3; mul.hi.s32 %r3, %r2, 5;", -1),
        ("mov.b32 %r2, -3; mul.hi.u32 %r3, %r2, 5;", 4),
        ("setp.ne.s32 %p1, 1, 1; mov.b32 %r2, 5; selp.f32 %r3, 0f3F800000, %r2, %p1;", 5),
        ("mov.b32 %r2, 3; redux.sync.add.s32 %r3, %r2, -1;", 96),
    ],
)
def test_an_instruction_means_what_the_isa_says(body, want):
    out = run_text(body + STORE.format("%r3"), torch.zeros(64, dtype=torch.int32))
    assert set(out.tolist()) == {want}


def test_a_shuffle_up_leaves_the_lowest_lanes_their_own():
    out = run_text("shfl.sync.up.b32 %r3, %r0, 2, 0, -1;" + STORE.format("%r3"), torch.zeros(64, dtype=torch.int32))
    assert out.tolist() == [max(t - 2, t if t % 32 < 2 else 0) for t in range(64)]


def test_warps_that_go_different_ways_meet_at_a_barrier():
    body = """setp.lt.u32 %p1, %r0, 32; mov.b32 %r2, 0; mul.wide.u32 %rd3, %r0, 4; cvt.u32.u64 %r4, %rd3;
@!%p1 bra $over; st.shared.b32 [%r4], %r0; $over: bar.sync 0; and.b32 %r4, %r4, 127; ld.shared.b32 %r3, [%r4];"""
    out = run_text(body + STORE.format("%r3"), torch.zeros(64, dtype=torch.int32))
    assert out.tolist() == [t % 32 for t in range(64)]
    with pytest.raises(RaceError, match="no barrier"):
        run_text(body.replace("bar.sync 0;", ""), torch.zeros(64, dtype=torch.int32))


def test_sums_of_all_warps_are_read_behind_a_barrier_of_all():
    add = "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [0], 0; bar.sync 0; atom.shared.add.u32 %r2, [0], 1;"
    read = " bar.sync 0; ld.shared.b32 %r3, [0];" + STORE.format("%r3")
    assert set(run_text(add + read, torch.zeros(64, dtype=torch.int32)).tolist()) == {64}
    for less in (read.replace("bar.sync", "bar.warp.sync"), read.replace(" bar.sync 0;", "")):
        with pytest.raises(RaceError, match="wrote is read"):
            run_text(add + less, torch.zeros(64, dtype=torch.int32))


def test_a_warp_that_waits_for_ever_is_seen():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $over; bar.sync 0; $over: add.u32 %r2, %r0, 1;"
    with pytest.raises(RuntimeError, match="wait"):
        run_text(body, torch.zeros(1, dtype=torch.int32))


def test_threads_of_a_warp_that_go_different_ways_are_not_run():
    with pytest.raises(NotImplementedError, match="of a warp"):
        run_text("setp.lt.u32 %p1, %r0, 7; @%p1 bra $over; mov.b32 %r2, 0; $over: bar.sync 0;", numbers(0))


def test_ctas_may_write_the_same_place_if_they_write_the_same():
    assert run_text("st.global.b32 [%rd0], 5;", numbers(0), ctas=3).tolist() == [5]
    with pytest.raises(RaceError, match="different values"):
        run_text("st.global.b32 [%rd0], %r1;", numbers(0), ctas=3)
    with pytest.raises(RaceError, match="different values"):
        run_text("st.global.b32 [%rd0], %r0;", numbers(0))
    with pytest.raises(RaceError, match="another CTA"):
        run_text("setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd0], 5; ld.global.b32 %r2, [%rd0];", numbers(0), ctas=2)


def test_an_address_has_to_be_a_multiple_of_what_is_read_there():
    for offset, error in ((0, None), (4, OutOfBoundsError), (8, OutOfBoundsError), (16, None), (32, OutOfBoundsError)):
        body = f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd0+{offset}];"
        if error:
            with pytest.raises(error, match=r"no multiple of 16|no tensor holds"):
                run_text(body, numbers(*range(8)))
        else:
            run_text(body, numbers(*range(8)))


def test_what_is_not_known_is_refused():
    with pytest.raises(NotImplementedError, match=r"add\.sat"):
        run_text("add.sat.s32 %r2, %r0, %r0;", numbers(0))
