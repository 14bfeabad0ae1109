# SPDX-License-Identifier: Apache-2.0
"""The static figures: SASS, occupancy, the budget, the model on paper.

Without nvcc or nvdisasm these fail with the sentence that says how to get them; none is skipped.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench import model, sass, static, toolkit
from bench.cli import cli
from bench.kernels import KERNELS, LINEAR_MAIN, ROUTED_KERNELS, SAMPLES, Kernel, select
from bench.occupancy import LIMITS, occupancy


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


# ---- SASS ----


def function(body: str) -> sass.Function:
    """A kernel from lines of SASS; ``name:`` is a label."""
    lines = ['\t.section\t.text.k,"ax",@progbits', "k:", ".text.k:"]
    address = 0
    for line in body.strip().splitlines():
        text = line.strip()
        if text.endswith(":"):
            lines.append(text)
        else:
            lines.append(f"        /*{address:04x}*/                   {text} ;")
            address += 16
    return sass.parse("\n".join(lines))["k"]


def opcodes(code: list[sass.Instruction]) -> list[str]:
    return [i.opcode for i in code]


def loops(body: str) -> list[list[str]]:
    flow = sass.graph(function(body))
    return [opcodes(loop.code(flow)) for loop in sass.natural_loops(flow)]


DISASSEMBLY = """\
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80"

//--------------------- .text._Z1kIfEvv           --------------------------
	.section	.text._Z1kIfEvv,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=67"
	.align	128
        .global         _Z1kIfEvv
        .size           _Z1kIfEvv,(.L_x_2 - _Z1kIfEvv)
_Z1kIfEvv:
.text._Z1kIfEvv:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDSM.16.M88.4 R20, [R46+0x20] ;
        /*0020*/                   HMMA.16816.F32.BF16 R40, R8.reuse, R20, RZ ;
        /*0030*/              @!P4 FMUL R42, R42, 0.5 ;
        /*0040*/                   @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*0050*/                   NOP ;
        /*0060*/              @!P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   BRA `(.L_x_1);
.L_x_2:

//--------------------- .nv.shared.reserved.0     --------------------------
	.section	.nv.shared.reserved.0,"aw",@nobits
	.align	16
nothing:
"""


def test_a_disassembly_is_parsed() -> None:
    functions = sass.parse(DISASSEMBLY)
    assert list(functions) == ["_Z1kIfEvv"]
    found = functions["_Z1kIfEvv"]
    assert [i.address for i in found.code] == list(range(0, 0x90, 16))
    assert found.labels[".L_x_0"] == 1 and found.labels[".L_x_2"] == len(found.code)
    hmma, fmul, uniform = found.code[2:5]
    assert (hmma.op, hmma.opcode, hmma.guard) == ("HMMA", "HMMA.16816.F32.BF16", "")
    assert hmma.operands == "R40, R8.reuse, R20, RZ"
    assert (fmul.op, fmul.guard) == ("FMUL", "@!P4")
    assert (uniform.op, uniform.guard) == ("UIADD3", "@!UPT")
    flow = sass.graph(found)
    loop = sass.main_loop(flow)
    assert loop is not None
    assert sass.mix(loop.code(flow)) == {
        "LDSM": 1, "HMMA": 1, "FP32": 1, "integer": 1, "control": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("BRA `(.L_x_9)\nEXIT", "no label .L_x_9"),
        ("BRA 0x120\nEXIT", "target unknown"),
        ("BRX R2 -0x10\nEXIT", "targets unknown"),
        ("?? what", "not an instruction"),
    ],
)
def test_text_that_is_not_understood_is_an_error(body: str, message: str) -> None:
    with pytest.raises(sass.SassError, match=message):
        sass.graph(function(body))


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.1688.F32.TF32", "HMMA"),
        ("DMMA.884", "HMMA"),
        ("LDSM.16.MT88.4", "LDSM"),
        ("LDGSTS.E.BYPASS.128", "LDGSTS"),
        ("FMNMX", "FP32"),
        ("HFMA2.MMA", "FP16"),
        ("MUFU.EX2", "MUFU"),
        ("F2FP.BF16.PACK_AB", "F2FP"),
        ("IMAD.WIDE", "integer"),
        ("ULDC.64", "integer"),
        ("UISETP.GE.AND", "integer"),
        ("STS.128", "LDS/STS"),
        ("LDG.E", "LDG/STG"),
        ("STL.64", "LDL/STL"),
        ("SHFL.BFLY", "SHFL/VOTE"),
        ("BAR.SYNC.DEFER_BLOCKING", "control"),
        ("BSYNC.RECONVERGENT", "control"),
        ("TEX.B", "other"),
    ],
)
def test_classes(opcode: str, expected: str) -> None:
    assert sass.class_of(sass.Instruction(0, "", opcode, "")) == expected


def test_an_inner_loop_and_an_outer_one() -> None:
    outer, inner = loops("""
        MOV R0, RZ
        .L_x_0:
        IADD3 R1, R1, 0x1, RZ
        .L_x_1:
        HMMA.16816.F32 R4, R8, R12, R4
        @P0 BRA `(.L_x_1)
        @P1 BRA `(.L_x_0)
        EXIT
    """)
    assert inner == ["HMMA.16816.F32", "BRA"]
    assert outer == ["IADD3", *inner, "BRA"]


@pytest.mark.parametrize(
    "end",
    [
        "@P0 BRA `(.L_x_0)",
        "BRA P0, `(.L_x_0)",
        "BRA.U UP0, `(.L_x_0)",
        "@P1 EXIT\nBRA `(.L_x_0)",
        "@P1 CALL.REL.NOINC `(.L_x_1)\nBRA `(.L_x_0)",
        'BRX R2 -0x30 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)',
    ],
)
def test_ways_to_close_a_loop(end: str) -> None:
    (body,) = loops(f".L_x_0:\nHMMA.16816.F32 R4, R8, R12, R4\n{end}\n.L_x_1:\nMOV R0, RZ\nEXIT")
    assert body[0] == "HMMA.16816.F32" and "MOV" not in body


@pytest.mark.parametrize(
    "end", ["@!PT BRA `(.L_x_0)", "EXIT\nBRA `(.L_x_0)", "CALL.REL.NOINC `(k)\nRET.REL.NODEC R2"]
)
def test_what_does_not_close_one(end: str) -> None:
    assert loops(f".L_x_0:\nHMMA.16816.F32 R4, R8, R12, R4\n{end}\nEXIT") == []


def test_a_subroutine_returns_and_lanes_reconverge() -> None:
    # The slow path of a division lies behind the kernel; BSYNC goes on where BSSY says.
    (body,) = loops("""
        .L_x_0:
        BSSY B0, `(.L_x_2)
        @P0 BRA `(.L_x_1)
        CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn)
        BSYNC B0
        FADD R9, R9, R9
        .L_x_1:
        MUFU.RCP R2, R3
        BSYNC B0
        .L_x_2:
        @P1 BRA `(.L_x_0)
        EXIT
        $__internal_0_$__cuda_sm3x_div_rn:
        FMUL R1, R1, R1
        RET.REL.NODEC R2
    """)
    assert body == ["BSSY", "BRA", "CALL.REL.NOINC", "BSYNC", "MUFU.RCP", "BSYNC", "BRA"]


def test_the_main_loop_is_the_innermost_with_most_products() -> None:
    flow = sass.graph(
        function("""
        .L_x_0:
        HMMA.16816.F32 R4, R8, R12, R4
        @P0 BRA `(.L_x_0)
        .L_x_1:
        HMMA.16816.F32 R4, R8, R12, R4
        HMMA.16816.F32 R4, R8, R12, R4
        HMMA.16816.F32 R4, R8, R12, R4
        .L_x_2:
        HMMA.16816.F32 R4, R8, R12, R4
        MUFU.EX2 R1, R1
        HMMA.16816.F32 R4, R8, R12, R4
        @P0 BRA `(.L_x_2)
        .L_x_3:
        LDG.E R1, [R2.64]
        @P0 BRA `(.L_x_3)
        @P0 BRA `(.L_x_1)
        EXIT
    """)
    )
    loop = sass.main_loop(flow)
    assert loop is not None
    assert sass.mix(loop.code(flow)) == {"HMMA": 2, "MUFU": 1, "control": 1}
    assert sass.main_loop(sass.graph(function(".L_x_0:\nBRA `(.L_x_0)"))) is None


def test_the_leanest_iteration_skips_what_a_branch_skips() -> None:
    body = """
        .L_x_0:
        HMMA.16816.F32 R4, R8, R12, R4
        @P0 BRA `(.L_x_1)
        LDGSTS.E.BYPASS.128 [R1], [R2.64]
        .L_x_1:
        @P1 BRA `(.L_x_2)
        FMUL R1, R1, R2
        FMUL R1, R1, R2
        .L_x_2:
        BRA.DIV ~URZ, `(.L_x_9)
        SHFL.BFLY PT, R1, R2, 0x1, 0x1f
        .L_x_3:
        HMMA.16816.F32 R4, R8, R12, R4
        NOP
        @P2 BRA `(.L_x_0)
        EXIT
        .L_x_9:
        MOV R1, R2
        MOV R1, R2
        BRA `(.L_x_3)
    """
    count = static.count(function(body))
    assert (count.tensor, count.every, count.lean) == (2, 13, 8)
    # The copies of the next step belong to an iteration, a rescale and a slow path do not.
    assert count.mix == {"HMMA": 2, "LDGSTS": 1, "SHFL/VOTE": 1, "control": 4}


def test_a_kernel_without_products_has_no_count() -> None:
    with pytest.raises(sass.SassError, match="k: no loop with tensor instructions"):
        static.count(function("MOV R0, RZ\nEXIT"))


# ---- occupancy ----


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks", "by"),
    [
        # 67 registers: 2304 a warp of 16384 a subpartition, 7 warps there, 28 of one warp each.
        (80, 67, 32, 2560, 28, ("registers",)),
        (80, 128, 128, 0, 4, ("registers",)),  # 4096 a warp, 16 warps
        (80, 168, 128, 49152, 3, ("registers", "shared memory")),  # 12 warps; 164 / (48 + 1)
        (86, 32, 32, 0, 16, ("blocks",)),
        (89, 32, 256, 0, 6, ("warps",)),
        (89, 128, 128, 33000, 3, ("shared memory",)),  # 33000 + 1024 is 34048 in units: 3.008
        (89, 128, 128, 33025, 2, ("shared memory",)),  # one more unit, 34176: 2.996
        (90, 64, 1024, 0, 1, ("registers",)),
        (90, 32, 128, 227 * 1024, 1, ("shared memory",)),
        (90, 32, 128, 227 * 1024 + 1, 0, ("shared memory",)),
        (100, 16, 64, 6 * 1024, 32, ("shared memory", "warps", "blocks")),
        (120, 66, 128, 16384, 5, ("shared memory",)),  # 100 / (16 + 1)
        (80, 255, 288, 0, 0, ("registers",)),  # nine warps are checked as twelve
        (80, 16, 1056, 0, 0, ("warps",)),
    ],
)
def test_occupancy(
    arch: int, registers: int, threads: int, shared: int, blocks: int, by: tuple[str, ...]
) -> None:
    found = occupancy(arch, registers=registers, threads=threads, shared=shared)
    assert (found.blocks, found.by) == (blocks, by)
    assert found.share == pytest.approx(blocks * threads / LIMITS[arch].threads)


CALCULATOR = r"""
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int arch, per_sm, shared_sm, registers, threads, shared;
  while (scanf("%d %d %d", &arch, &per_sm, &shared_sm) == 3 &&
         scanf("%d %d %d", &registers, &threads, &shared) == 3) {
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10, device.computeMinor = arch % 10, device.warpSize = 32;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = per_sm;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.numSms = 1;
    device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = shared_sm;
    device.sharedMemPerBlockOptin = shared_sm - 1024, device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.numBlockBarriers = 1;
    kernel.sharedSizeBytes = 0, kernel.maxDynamicSharedSizeBytes = shared_sm - 1024;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state,
                                                              threads, shared);
    printf("%d\n", error ? -error : result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_that_of_nvidias_header(tmp_path: Path) -> None:
    """The header knows blocks per SM and all granularities; the other limits are handed to it."""
    source, program = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    nvcc = toolkit.find("nvcc")
    done = subprocess.run(
        [nvcc, "-cudart=none", source, "-o", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grid = list(
        itertools.product(
            LIMITS,
            (16, 32, 40, 41, 64, 67, 96, 128, 168, 200, 255),
            (32, 64, 96, 128, 160, 256, 288, 384, 512, 1024),
            (0, 1, 1000, 6 * 1024, 16384, 33000, 49152, 65536, 99 * 1024),
        )
    )
    lines = [f"{a} {LIMITS[a].threads} {LIMITS[a].shared} {r} {t} {s}" for a, r, t, s in grid]
    answer = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    ours = [occupancy(a, registers=r, threads=t, shared=s).blocks for a, r, t, s in grid]
    assert [int(n) for n in answer.stdout.split()] == ours


# ---- figures ----

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_80'
ptxas info    : Function properties for _Z5firstv
    352 bytes stack frame, 680 bytes spill stores, 704 bytes spill loads
ptxas info    : Function properties for helper
    8 bytes stack frame, 1 bytes spill stores, 1 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 352 bytes cumulative stack size
ptxas info    : Compile time = 56.666 ms
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 67 registers, used 1 barriers, 2560 bytes smem
"""


def test_what_ptxas_says() -> None:
    assert static.resources(PTXAS) == {
        "_Z5firstv": static.Resources(registers=32, stack=352, spills=1384, shared=0),
        "second": static.Resources(registers=67, stack=0, spills=0, shared=2560),
    }


def test_one_symbol_is_meant() -> None:
    kernel = Kernel("k", Path("k.cu"), "*kernel*half*", 128)
    names = ["_Z6kernelI6__halfEvv", "_Z6kernelI13__nv_bfloat16Evv"]
    assert static.symbol(kernel, names) == names[0]
    with pytest.raises(ValueError, match=r"k: 0 symbols of its source fit .*: _Z6kernelI13"):
        static.symbol(kernel, names[1:])
    with pytest.raises(ValueError, match="k: 2 symbols"):
        static.symbol(kernel, [names[0], "_Z7kernel2I6__halfEvv"])


def by_name(name: str) -> Kernel:
    (kernel,) = select([name])
    return kernel


def test_each_path_is_counted_alone() -> None:
    """What the source has: 16 products, 8 ldmatrix, 2 copies and 8 exp2 a step, 8 masked scores."""
    figures = static.measure(by_name("sample paths bf16"), 80)
    full, edge = figures.loops["full"], figures.loops["edge"]
    assert figures.shared == 2 * 16 * 72 * 2
    for count in (full, edge):
        counted = {name: count.mix[name] for name in ("HMMA", "LDSM", "LDGSTS", "MUFU", "F2FP")}
        assert counted == {"HMMA": 16, "LDSM": 8, "LDGSTS": 2, "MUFU": 8, "F2FP": 4}
        assert count.every >= count.lean + 32  # the rescale of the accumulators
        assert sass.OTHER not in count.mix
    assert edge.mix["FP32"] == full.mix["FP32"] + 8
    assert full.lean < edge.lean


def test_spills_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "spill.cu"
    source.write_text("""
        extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x, int n) {
          float a[80];
          for (int i = 0; i < 80; i++) a[i] = x[i * 1024 + threadIdx.x];
          for (int k = 0; k < n; k++)
            for (int i = 0; i < 80; i++) a[i] = a[i] * a[(i + 7) % 80] + k;
          for (int i = 0; i < 80; i++) x[i * 1024 + threadIdx.x] = a[i];
        }""")
    figures = static.measure(Kernel("spill", source, "spill", 1024, paths=()), 80)
    assert figures.resources.registers == 32
    assert figures.resources.stack > 0 and figures.resources.spills > 0
    assert figures.occupancy.blocks == 2


# ---- the budget ----

COUNT = static.Count(tensor=16, every=135, lean=100, mix={"HMMA": 16})


def figures(registers: int = 80, spills: int = 0, blocks: int = 12) -> static.Figures:
    held = static.Occupancy(blocks, ("registers",), 0.5)
    own = static.Resources(registers, 0, spills, 0)
    return static.Figures("k", 80, own, 0, held, {"full": COUNT})


def test_a_budget_is_written_and_held(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    path.write_text(
        '{"nvcc": "1", "kernels": {"gone": {"80": {}}, "kept": {"80": {"registers": 1}}}}'
    )
    static.write_budget([figures()], ["k", "kept"], path)
    budget = static.load_budget(path)
    assert budget["nvcc"] == static.nvcc_release() != "1"
    assert list(budget["kernels"]) == ["k", "kept"]
    assert budget["kernels"]["k"]["80"] == {
        "registers": 80, "stack bytes": 0, "spill bytes": 0, "blocks per SM": 12,
        "instructions per HMMA, full": 8.44, "instructions per HMMA, full, lean": 6.25,
    }  # fmt: skip
    assert static.over_budget(figures(), budget) == []
    assert static.over_budget(figures(registers=79, blocks=13), budget) == []
    worse = static.over_budget(figures(registers=81, spills=4, blocks=11), budget)
    assert [s.partition(" (")[0] for s in worse] == [
        "k, sm_80: registers is 81, at most 80 allowed",
        "k, sm_80: spill bytes is 4, at most 0 allowed",
        "k, sm_80: blocks per SM is 11, at least 12 allowed",
    ]
    budget["kernels"]["k"]["80"]["instructions per HMMA, full"] = 8.43
    (sentence,) = static.over_budget(figures(), budget)
    assert "instructions per HMMA, full is 8.44, at most 8.43 allowed" in sentence
    del budget["kernels"]["k"]["80"]["registers"]
    assert static.HOW in static.over_budget(figures(), budget)[0]
    assert static.over_budget(figures(), {"kernels": {}}) == [f"k, sm_80: no budget; {static.HOW}"]


# What most calls run; their variants are the same templates.
def of_bf16(kernels: tuple[Kernel, ...], *buckets: str) -> list[Kernel]:
    return [k for k in kernels if "bf16" in k.name and k.name.split("_bf16_")[1] in buckets]


LISTS = [k for k in of_bf16(ROUTED_KERNELS, "64") if "bias_gradient" not in k.name]
MAIN = of_bf16(KERNELS, "64", "64_long") + LISTS
WIDE = of_bf16(KERNELS, "128", "128_long")


def test_the_budget_names_the_kernels_there_are() -> None:
    budget = static.load_budget()["kernels"]
    assert set(budget) == {kernel.name for kernel in (*MAIN, *WIDE, *LINEAR_MAIN, *SAMPLES)}
    for name, architectures in budget.items():
        assert list(architectures) == [str(a) for a in static.ARCHITECTURES], name


@pytest.mark.parametrize("kernel", [*MAIN, *WIDE, *SAMPLES], ids=lambda kernel: kernel.name)
def test_kernels_keep_their_budget(kernel: Kernel) -> None:
    """All figures; each path is a build of its own."""
    worse = static.over_budget(static.measure(kernel, 80), static.load_budget())
    assert not worse, "\n".join(worse)


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", LINEAR_MAIN, ids=lambda kernel: kernel.name)
def test_linear_kernels_keep_their_budget(kernel: Kernel) -> None:
    worse = static.over_budget(static.measure(kernel, 80), static.load_budget())
    assert not worse, "\n".join(worse)


@pytest.mark.heavy
@pytest.mark.parametrize("arch", static.ARCHITECTURES[1:])
@pytest.mark.parametrize("kernel", [*MAIN, *LINEAR_MAIN], ids=lambda kernel: kernel.name)
def test_kernels_keep_their_budget_elsewhere(kernel: Kernel, arch: int) -> None:
    worse = static.over_budget(static.measure(kernel, arch, loops=False), static.load_budget())
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize("kernel", [k.name.removeprefix("routed_") for k in LISTS])
def test_lists_cost_little_beside_windows(kernel: str) -> None:
    """What a step takes that no branch skips, on either path."""
    loops = [static.measure(by_name(f"{x}_{kernel}"), 80).loops for x in ("routed", "window")]
    for path in ("full", "edge"):
        routed, window = (found[path] for found in loops)
        assert routed.tensor == window.tensor and routed.lean <= 1.1 * window.lean, path


# ---- the command ----


def test_without_the_compiler_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(toolkit, "_candidates", lambda tool: [tmp_path / tool])
    done = bench("static", "sample gemm", "--arch", "80")
    assert done.exit_code == 3
    assert done.output.startswith("no nvcc: put one on PATH")


def test_from_the_command_line() -> None:
    done = bench("static", "sample paths*", "--arch", "80", "--mix", "--check")
    assert done.exit_code == 0, done.output
    assert "| sample paths bf16 | 80 |" in done.output
    assert "| edge | 16 |" in done.output
    assert "| kernel | sm | path | HMMA | LDSM |" in done.output


def test_a_figure_over_its_budget_turns_the_command_red(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "budget.json"
    budget = static.load_budget()
    budget["kernels"]["sample gemm"]["80"]["registers"] = 1
    path.write_text(json.dumps(budget))
    monkeypatch.setattr(static, "BUDGET", path)
    command = ("static", "sample gemm", "--arch", "80", "--no-loops")
    done = bench(*command, "--check")
    assert done.exit_code == 1
    assert "sample gemm, sm_80: registers is" in done.output
    assert bench(*command).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("static", "nobody"), "nobody"),
        (("static", "--arch", "70"), "70"),
        (("static", "--no-loops", "--write-budget"), "--no-loops"),
        (("model", "--kernel", "sample gemm"), "no full and edge path"),
        (("model", "--kernel", "sample*"), "one kernel"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], word: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2
    assert word in done.output


# ---- the model ----


def test_work_of_a_tile_by_hand() -> None:
    """64 rows, window 512, D 64: 575 keys, of which all rows attend [63, 512): 7 steps of 64."""
    problem = model.Problem(length=65536, window=512, head_dim=64)
    work = model.forward(problem)
    tile = 4 * 8 * 4 * 2  # row groups, key groups, depth groups of a step; two products
    assert (work.full, work.edge) == (7 * tile, 2 * tile)
    assert work.fma == 2 * 64 * 576 * 64
    assert work.special * 32 == 64 * 576
    assert work.shared == 5 * 2 * 576 * 64 * 2  # written once, read by four warps
    assert work.l2 == 2 * 576 * 64 * 2 + 2 * 64 * 64 * 2
    assert work.dram * problem.tiles == 4 * 65536 * 64 * 2
    counted = model.forward(problem, 8.0, 10.0)
    assert counted.issue == 8 * work.full + 10 * work.edge > work.issue
    wide = model.forward(model.Problem(65536, 512, 64, warp_rows=32))
    assert wide.shared == 3 * 2 * 576 * 64 * 2  # read by two
    single = model.forward(model.Problem(65536, 512, 64, dtype="float32"))
    assert single.full == 2 * work.full  # half the depth of a product


def test_floors_by_hand() -> None:
    """312 TFLOP/s of bf16 and half of that in TF32; 1555 GB/s; four instructions a clock."""
    a100 = model.A100
    work = model.Work(0, 0, issue=4.0, fma=156e12, fp32=0, special=0.5, shared=0, l2=0, dram=1555e9)
    floors = model.floors(work, "bfloat16")
    assert floors["tensor pipe"] == pytest.approx(1, rel=1e-3)
    assert model.floors(work, "float32")["tensor pipe"] == pytest.approx(2, rel=1e-3)
    assert floors["DRAM"] == 1
    clock = 1 / (a100.multiprocessors * a100.clock)
    assert floors["issue slots"] == pytest.approx(clock)
    assert floors["special functions"] == pytest.approx(clock)


@pytest.mark.parametrize("kernel", [(), ("--kernel", "sample paths bf16")])
def test_what_is_modelled_says_so(kernel: tuple[str, ...]) -> None:
    done = bench("model", "--length", "4096", "--window", "128", *kernel)
    assert done.exit_code == 0, done.output
    blocks = done.output.strip().split("\n\n")
    assert len(blocks) == 3
    assert all(model.LABEL in block for block in blocks)
    assert done.output.count("(binds)") == 1
    assert ("not counted" in done.output) != bool(kernel)
