"""Inner loops that are and that could be: instructions and, by llvm-mca's models of cores, cycles for their products.

    python -m benchmarks.inner_loops

Every loop is the work for some multiply-accumulates, everything in registers or the first cache: what decides whether
a multiply is worth writing, before it is written. Those of "prefill" are the loops that kernels have in assembly, and
the one that 8-bit weights could have: with scales, for groups of 32 with an activation scale for each, or for integer
grids, whose groups end where codes are unpacked.
"""

import argparse
import itertools
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.kernels.intrin.assembly import OPERANDS, Assembly, Form, looped, registers, scale_loads
from agq_tvm.kernels.intrin.dotprod import DOTPROD
from agq_tvm.kernels.intrin.i8mm import I8MM
from agq_tvm.kernels.intrin.neon import NEON
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.tuning.core_model import find_simulator
from benchmarks.tables import RESULTS, aligned, report, write_report

_ROUNDS = 1000
_ARM = {core: "aarch64" for core in ("cortex-a72", "neoverse-n1", "neoverse-n2", "cortex-x2")}
_PREFILL = Form(per_group=True, blocks=1, groups=64, unroll=4)


@dataclass(frozen=True)
class Loop:
    """One inner loop.

    Attributes
    ----------
    name : str
    cores : tuple of str
        LLVM's names of the cores it is for.
    products : int
        Multiply-accumulates of 4-bit weights, or of 8-bit ones where the name says so.
    lines : list of str
        Its instructions; registers that a round only reads or only adds to are its operands and sums.
    """

    name: str
    cores: tuple[str, ...]
    products: int
    lines: list[str]


def arm_loops() -> list[Loop]:
    """List prefill's multiplies on their own, then decode's with what unpacks nibbles: 16 columns, 4 channels."""
    smlal = [f"smlal{s} v{2 * i + h}.8h, v{16 + i}.{t}, v20.{t}" for i in range(4) for h, s, t in _HALVES]
    mla = [_mla(i, 16 + 2 * i, 17 + 2 * i) for i in range(2)]
    smull = [
        line
        for i in range(4)
        for h, s, t in _HALVES
        for line in (f"smull{s} v{24 + h}.8h, v{16 + i}.{t}, v20.{t}", f"sadalp v{2 * i + h}.4s, v{24 + h}.8h")
    ]
    sdot = [f"sdot v{i}.4s, v{16 + i % 4}.16b, v{20 + i // 4}.4b[0]" for i in range(8)]
    smmla = [f"smmla v{i}.4s, v{16 + i % 4}.16b, v{20 + i // 4}.16b" for i in range(8)]
    wide = [f"smlal{s} v{2 * i + h}.8h, v{18 + i}.{t}, v30.{t}" for i in range(4) for h, s, t in _HALVES]
    return [
        Loop("W8A8: smull, sadalp", ("cortex-a72",), 64, smull),
        Loop("W4A8: smlal", ("cortex-a72",), 64, smlal),
        Loop("W4A4: mul, mla, sadalp", ("cortex-a72",), 64, [line for part in mla for line in part]),
        Loop("W4A4: Algorithm 1", ("cortex-a72",), 16, [line for i in range(2) for line in _algorithm_1(i)]),
        Loop("W4A8, W4A4, W8A8: sdot", ("neoverse-n1",), 128, sdot),
        Loop("W4A8, W4A4, W8A8: smmla", ("neoverse-n2",), 256, smmla),
        Loop("decode: smlal", ("cortex-a72", "neoverse-n1"), 64, [*_NIBBLES, *wide]),
        Loop("decode: sdot", ("neoverse-n1",), 64, [*_NIBBLES, *(_sdot_lane(i) for i in range(4))]),
        Loop("decode: tbl, sums of 8 bits", ("cortex-a72", "neoverse-n1"), 64, [*_NIBBLES, *_look_ups(False)]),
        Loop("decode: tbl, sums of 16 bits", ("cortex-a72", "neoverse-n1"), 64, [*_NIBBLES, *_look_ups(True)]),
    ]


_HALVES = ((0, "", "8b"), (1, "2", "16b"))
_NIBBLES = [
    "ldp q16, q17, [x0], #32",
    *(f"and v{18 + 2 * i}.16b, v{16 + i}.16b, v31.16b" for i in range(2)),
    *(f"ushr v{19 + 2 * i}.16b, v{16 + i}.16b, #4" for i in range(2)),
]


def prefill_loops() -> list[Loop]:
    """List what one round of a kernel's loop in assembly takes; where it takes bytes, 8-bit weights have the same."""
    name, bytewise, grid = "prefill, groups of 32:", "W4A8, W4A4, W8A8", "prefill, integer grid: W4A8, W4A4"
    neon = NEON.assembly
    return [
        _prefill(f"{name} W4A8", ("cortex-a72",), neon, neon.lines(_PREFILL)),
        _prefill(f"{name} W4A4", ("cortex-a72",), neon, NEON.assembly_4x4.lines(_PREFILL)),
        _prefill(f"{name} W8A8", ("cortex-a72",), neon, _neon_8bit(_PREFILL)),
        _prefill(f"{name} {bytewise}", ("neoverse-n1",), DOTPROD.assembly, DOTPROD.assembly.lines(_PREFILL)),
        _prefill(f"{name} {bytewise}", ("cortex-x2",), I8MM.assembly, I8MM.assembly.lines(_PREFILL)),
        _prefill(grid, ("neoverse-n1",), DOTPROD.assembly, DOTPROD.assembly.grid(_PREFILL.unroll)),
        _prefill(grid, ("cortex-x2",), I8MM.assembly, I8MM.assembly.grid(_PREFILL.unroll)),
    ]


def _prefill(name: str, cores: tuple[str, ...], loop: Assembly, lines: list[str]) -> Loop:
    """Take the body of a loop, with registers for its operands."""
    body = lines[lines.index("1:") + 1 : lines.index("b.ne 1b")]
    text = "\n".join(body)
    for place, operand in enumerate(OPERANDS):
        text = text.replace("{" + operand + "}", f"x{place}")
    products = loop.rows * loop.columns * _PREFILL.unroll * _PREFILL.blocks * K_BLOCK
    return Loop(name, cores, products, text.split("\n"))


def _neon_8bit(form: Form) -> list[str]:
    """Sum groups of 32 channels of 8-bit weights, 2 rows by 4 vectors of 8 columns: no kernel of ours.

    16 bits take two products, 2 * 127 * 127 = 32258. v0-v15 dot products in 32 bits, v16-v19 weights, v20-v23 repeated
    activations, v24-v27 activations, v28 and v29 their scales, v30 and v31 products.
    """
    lines = scale_loads(form, 2, 28)
    for group in range(form.unroll):
        lines.append(f"ld1 {registers('16b', 24)}, [{{x}}], {{stride}}")
        for step, v in itertools.product(range(8), range(4)):
            if v == 0:
                words = [(i, 24 + i // 2 * 2 + step // 4, (2 * step + i % 2) % 8) for i in range(4)]
                lines += [f"dup v{20 + i}.8h, v{x}.h[{word}]" for i, x, word in words]
            if v % 2 == 0:
                lines.append(f"ld1 {registers('16b', 16)}, [{{codes}}], #64")
            for r, (half, s, kind) in itertools.product(range(2), _HALVES):
                for i, multiply in enumerate(("smull", "smlal")):
                    lines.append(
                        f"{multiply}{s} v{30 + half}.8h, v{16 + v % 2 * 2 + i}.{kind}, v{20 + 2 * r + i}.{kind}"
                    )
                lines.append(f"sadalp v{8 * r + 2 * v + half}.4s, v{30 + half}.8h")
        for half, r in itertools.product(range(2), range(2)):
            first = 8 * r + 4 * half
            lines += [f"ld1 {registers('4s', 20)}, [{{factors}}], #64"] * (r == 0)
            lines += [
                f"ld1 {registers('4s', 16)}, [{{factors}}]{', #64' * r}",
                f"ld1 {registers('4s', 24)}, [{{sums}}]",
            ]
            lines += [f"fmla v{16 + i}.4s, v{first + i}.4s, v{20 + i}.4s" for i in range(4)]
            lines += [f"fmla v{24 + i}.4s, v{16 + i}.4s, v{28 + r}.s[{group}]" for i in range(4)]
            lines += [f"st1 {registers('4s', 24)}, [{{sums}}], #64", f"ld1 {registers('4s', first)}, [{{magic}}]"]
        lines.append("sub {sums}, {sums}, #256")
    return looped(lines)


def _mla(total: int, first: int, second: int) -> list[str]:
    byte = 24 + total
    products = [f"mul v{byte}.16b, v{first}.16b, v20.16b", f"mla v{byte}.16b, v{second}.16b, v21.16b"]
    return [*products, f"sadalp v{total}.8h, v{byte}.16b"]


def _algorithm_1(i: int) -> list[str]:
    a, b = f"v{24 + 2 * i}", f"v{25 + 2 * i}"
    return [
        f"tbl {a}.16b, {{v{16 + i}.16b}}, v30.16b",
        f"mul {a}.4s, {a}.4s, v20.4s",
        f"shl {b}.4s, {a}.4s, #8",
        f"orr {a}.16b, {a}.16b, {b}.16b",
        f"and {a}.16b, {a}.16b, v31.16b",
        f"add v{i}.4s, v{i}.4s, {a}.4s",
    ]


def _sdot_lane(i: int) -> str:
    return f"sdot v{i}.4s, v{18 + i}.16b, v30.4b[{i % 2}]"


def _look_ups(wide: bool) -> list[str]:
    """Look up what 4 activations come to for each of 16 columns, once for each bit of the weights.

    A table has 16 sums of 4 activations. They have 10 bits: two look-ups, or a table that is rounded to 8.
    """
    lines = []
    for i in range(4):
        index, low, high = f"v{18 + i}.16b", f"v{22 + i}", f"v{26 + i % 2}"
        lines.append(f"tbl {low}.16b, {{v29.16b}}, {index}")
        if wide:
            lines += [f"tbl {high}.16b, {{v30.16b}}, {index}", f"zip1 v16.16b, {low}.16b, {high}.16b"]
            lines += [f"zip2 v17.16b, {low}.16b, {high}.16b"]
            lines += [f"add v{2 * i + h}.8h, v{2 * i + h}.8h, v{16 + h}.8h" for h in range(2)]
        else:
            lines += [f"saddw{s} v{2 * i + h}.8h, v{2 * i + h}.8h, {low}.{t}" for h, s, t in _HALVES]
    return lines


def x86_loops() -> list[Loop]:
    """List decode's multiplies with what unpacks nibbles: as many columns as a register has bytes, 4 channels."""
    loops = []
    for register, lanes, core in (("ymm", 32, "haswell"), ("zmm", 64, "znver4")):
        r = [f"%{register}{i}" for i in range(32)]
        nibbles = [line for i in range(2) for line in _x86_nibbles(r, i, lanes)]
        products = 4 * lanes
        if register == "zmm":
            multiplies = [f"vpdpbusd {r[15]}, {r[9 + i]}, {r[i]}" for i in range(4)]
            loops.append(Loop("decode: vpdpbusd", (core,), products, [*nibbles, *multiplies]))
        else:
            pairs = [(f"vpmaddubsw {r[15]}, {r[9 + i]}, {r[13]}", f"vpaddw {r[13]}, {r[i]}, {r[i]}") for i in range(4)]
            loops.append(
                Loop("decode: vpmaddubsw", (core,), products, [*nibbles, *(x for pair in pairs for x in pair)])
            )
        sums = []
        for i in range(4):
            sums.append(f"vpshufb {r[9 + i]}, {r[15]}, {r[9 + i]}")
            for h, side in enumerate("lh"):
                # A byte above a byte of zeros is 256 times itself in 16 bits.
                sums.append(f"vpunpck{side}bw {r[9 + i]}, {r[8]}, {r[13]}")
                sums.append(f"vpaddw {r[13]}, {r[2 * i + h]}, {r[2 * i + h]}")
        loops.append(Loop("decode: vpshufb, sums of 8 bits", (core,), products, [*nibbles, *sums]))
    return loops


def _x86_nibbles(r: list[str], i: int, lanes: int) -> list[str]:
    raw, low, high = r[13], r[9 + 2 * i], r[10 + 2 * i]
    move, bitwise = ("vmovdqu", "vpand") if lanes == 32 else ("vmovdqu64", "vpandd")
    return [
        f"{move} {i * lanes}(%rax), {raw}",
        f"{bitwise} {r[14]}, {raw}, {low}",
        f"vpsrlw $4, {raw}, {high}",
        f"{bitwise} {r[14]}, {high}, {high}",
    ]


def cycles(loop: Loop, core: str, tool: str) -> float:
    """Return the cycles of one round in the steady state.

    Raises
    ------
    AgqError
        If llvm-mca refuses the loop.
    """
    triple = _ARM.get(core, "x86_64")
    command = [tool, f"-mtriple={triple}", f"-mcpu={core}", f"-iterations={_ROUNDS}"]
    text = "\n".join(loop.lines) + "\n"
    result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    found = re.search(r"^Total Cycles:\s+(\d+)", result.stdout, re.MULTILINE)
    if result.returncode or not found:
        raise AgqError(f"llvm-mca cannot run {loop.name} on {core}: {result.stderr.strip()[:200]}")
    return int(found[1]) / _ROUNDS


def main() -> None:
    """Count, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_loops", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "inner_loops.json", metavar="FILE")
    arguments = parser.parse_args()
    (tool, _), rows = find_simulator(), []
    for loop in (*arm_loops(), *prefill_loops(), *x86_loops()):
        for core in loop.cores:
            taken, count = cycles(loop, core, tool), len(loop.lines)
            ratios = (f"{loop.products / count:.2f}", f"{loop.products / taken:.2f}")
            rows.append((loop.name, core, str(loop.products), str(count), f"{taken:.1f}", *ratios))
    head = ("loop", "core", "MAC", "instructions", "cycles", "MAC/instruction", "MAC/cycle")
    print(aligned([head, *rows]))
    results = [dict(zip(head, row, strict=True)) for row in rows]
    write_report(arguments.json, report("benchmarks.inner_loops", (), llvm_mca=Path(tool).name, results=results))


if __name__ == "__main__":
    try:
        main()
    except AgqError as error:
        sys.exit(f"benchmarks.inner_loops: {error}")
