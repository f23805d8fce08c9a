"""Cycles of Arm kernels by `llvm-mca`'s models of cores, weighted by how often each block ran.

A model knows a core's decoder width, units, latencies and registers. It leaves out caches and memory (every access
hits the first level), that a load may wait for a store, branch prediction and the fetching of instructions: the cycles
are a lower bound of a real core's, good for ranking kernels and for telling which unit limits them.
"""

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import cache

from agq_tvm.errors import AgqError
from agq_tvm.targets import Device
from agq_tvm.tuning.block_counts import Count
from agq_tvm.tuning.disassembly import Instruction, Region, innermost_loops, output_of, regions

CORES = {"cortex-a72": "cortex-a72", "cortex-a76": "neoverse-n1", "cortex-a77": "neoverse-n1"}
"""By the device's core: LLVM's model of it. Under the name of the A76 and A77 it has the tables of the older A57."""

_OLDEST, _NEWEST = 17, 40
_ITERATIONS = 100
_COVERED = 0.99
_MULTIPLY = re.compile(r"(s|u|us)?(mull2?|mlal2?|dot|mmla)|mul|mla")
_UNPACK = re.compile(r"and|bic|eor|add|sub|ushr|sshr|usra|shl|sli|sri|tbl")
_BYTES = re.compile(r"v\d+\.(16|8)b")


@dataclass(frozen=True)
class Cycles:
    """What a core model says of a call of a kernel.

    Attributes
    ----------
    core : str
        LLVM's name of the model.
    cycles, bound : float
        Of the whole kernel: cycles, and those in which its multiplies keep their unit busy.
    loop_cycles, loop_bound : float
        Of the innermost loop that executes most multiplies.
    limit : str
        The unit that is busiest in that loop, or ``"decode"``, with its share of the cycles in percent.
    covered : float
        The part of all executed instructions that was simulated.
    """

    core: str
    cycles: float
    bound: float
    loop_cycles: float
    loop_bound: float
    limit: str
    covered: float


@dataclass(frozen=True)
class _Simulation:
    """One run through a region in the steady state: cycles, of which multiplies, and the cycles units are busy."""

    cycles: float
    bound: float
    busy: Counter


def is_multiply(instruction: Instruction) -> bool:
    """Whether an instruction of AArch64 multiplies vectors of integers."""
    return bool(_MULTIPLY.fullmatch(instruction.mnemonic)) and instruction.operands.startswith("v")


def is_unpacking(instruction: Instruction) -> bool:
    """Whether an instruction of AArch64 masks, shifts, centers or looks up vectors of bytes."""
    return bool(_UNPACK.fullmatch(instruction.mnemonic)) and bool(_BYTES.match(instruction.operands))


@cache
def find_simulator() -> tuple[str, int]:
    """Return the newest ``llvm-mca``, and its version.

    Raises
    ------
    AgqError
        If there is none that has a model of neoverse-n1.
    """
    names = [f"llvm-mca-{version}" for version in range(_NEWEST, _OLDEST - 1, -1)]
    for name in filter(shutil.which, [*names, "llvm-mca"]):
        version = re.search(r"version (\d+)", output_of([name, "--version"]))
        if version and int(version[1]) >= _OLDEST:
            return name, int(version[1])
    raise AgqError(f"core models need llvm-mca {_OLDEST} or newer: install it with: apt-get install llvm-22")


def unpacking(listing: dict[int, Instruction], count: Count) -> int:
    """Return how many instructions of a call mask, shift, center or look up vectors of bytes."""
    return sum(region.runs * sum(map(is_unpacking, region.instructions)) for region in regions(listing, count))


def simulate(listing: dict[int, Instruction], count: Count, device: Device) -> Cycles:
    """Simulate the blocks that make up 99 % of what a call executed, each as a loop of its own.

    Raises
    ------
    AgqError
        If there is no simulator, or none for the device's core.
    """
    if device.cpu not in CORES:
        raise AgqError(f"there is no core model for {device.cpu}: there are some for {', '.join(CORES)}")
    core, simulated, executed = CORES[device.cpu], [], 0
    for region in sorted(regions(listing, count), key=lambda region: -region.executed):
        if executed >= _COVERED * count.instructions:
            break
        simulated.append((region, _simulate_region(region, core)))
        executed += region.executed
    loop = _busiest_loop([region for region, _ in simulated])
    inside = [(region, one) for region, one in simulated if region.instructions[0].address in loop]
    cycles, bound = _total(simulated, "cycles"), _total(simulated, "bound")
    loop_cycles, loop_bound = _total(inside, "cycles"), _total(inside, "bound")
    return Cycles(core, cycles, bound, loop_cycles, loop_bound, _limit(inside), executed / count.instructions)


def _total(simulated: list[tuple[Region, _Simulation]], what: str) -> float:
    return sum(region.runs * getattr(one, what) for region, one in simulated)


def _busiest_loop(simulated: list[Region]) -> range:
    """Return the addresses of the innermost loop that executes most multiplies."""
    executed = [instruction for region in simulated for instruction in region.instructions]
    executed.sort(key=lambda instruction: instruction.address)

    def multiplies(loop: tuple[int, int]) -> int:
        inside = (region for region in simulated if loop[0] <= region.instructions[0].address <= loop[1])
        return sum(region.runs * sum(map(is_multiply, region.instructions)) for region in inside)

    first, last = max(innermost_loops(executed), key=multiplies, default=(executed[0].address, executed[-1].address))
    return range(first, last + 1)


def _limit(simulated: list[tuple[Region, _Simulation]]) -> str:
    busy = Counter()
    for region, one in simulated:
        busy.update({unit: region.runs * cycles for unit, cycles in one.busy.items()})
    unit, cycles = busy.most_common(1)[0]
    return f"{unit} {100 * cycles / _total(simulated, 'cycles'):.0f}"


def _simulate_region(region: Region, core: str) -> _Simulation:
    text = "\n".join(_assembly(instruction) for instruction in region.instructions)
    command = [find_simulator()[0], "-mtriple=aarch64", f"-mcpu={core}", f"-iterations={_ITERATIONS}", "-json"]
    report = json.loads(output_of(command, text))
    (result,) = report["CodeRegions"]
    infos = result["InstructionInfoView"]["InstructionList"]
    if len(infos) != len(region.instructions):
        raise AgqError(f"llvm-mca read {len(infos)} of {len(region.instructions)} instructions")
    bound = sum(info["RThroughput"] for info, one in zip(infos, region.instructions, strict=True) if is_multiply(one))
    summary = result["SummaryView"]
    busy = Counter(decode=summary["TotaluOps"] / summary["DispatchWidth"] / _ITERATIONS)
    for usage in result["ResourcePressureView"]["ResourcePressureInfo"]:
        if usage["InstructionIndex"] == len(infos):  # the sum of all
            busy[_unit(report["TargetInfo"]["Resources"][usage["ResourceIndex"]])] += usage["ResourceUsage"]
    return _Simulation(summary["TotalCycles"] / _ITERATIONS, bound, busy)


def _unit(name: str) -> str:
    """Return a unit's name without its core's; units of one kind come as "name.", then their number as a character."""
    kind, _, number = re.sub(r"^\w+?Unit", "", name).partition(".")
    return f"{kind}{ord(number)}" if number else kind


def _assembly(instruction: Instruction) -> str:
    """Return an instruction as an assembler reads it: addresses become a symbol."""
    operands = re.sub(r"[0-9a-f]+ <[^>]*>", "elsewhere", instruction.operands)
    return f"{instruction.mnemonic} {operands}"
