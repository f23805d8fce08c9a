"""Cycles of kernels by `llvm-mca`'s models of cores, weighted by how often each block ran.

A model knows a core's decoder width, units, latencies and registers. It leaves out caches and memory (every access
hits the first level), that a load may wait for a store, branch prediction and the fetching of instructions: the cycles
are a lower bound of a real core's, good for ranking kernels and for telling which unit limits them.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from agq_tvm.errors import AgqError
from agq_tvm.targets import Device
from agq_tvm.tuning.block_counts import Count
from agq_tvm.tuning.disassembly import Instruction, Region, innermost_loops, output_of, regions

CORES = {
    "cortex-a72": "cortex-a72",
    "cortex-a76": "neoverse-n1",
    "cortex-a77": "neoverse-n1",
    "cortex-x2": "cortex-x2",
    "x86-64-v3": "haswell",
}
"""By the device's core: LLVM's model of it.

Under the name of the A76 and A77 it has the tables of the older A57; under that of the X2, in LLVM 22, those of the
Neoverse V2, which has its four vector units.
"""

_OLDEST, _NEWEST = 17, 40
_ITERATIONS = 100
_COVERED = 0.99
_MULTIPLY = re.compile(r"(s|u|us)?(mull2?|mlal2?|dot|mmla)|mul|mla")
_X86_MULTIPLY = re.compile(r"vpdpb\w+|vpmaddubsw")
_UNPACK = re.compile(r"and|bic|eor|add|sub|ushr|sshr|usra|shl|sli|sri|tbl")
_DOT = re.compile(r"(s|u|us)(dot|mmla)")
_BYTES = re.compile(r"v\d+\.(16|8)b")


@dataclass(frozen=True)
class Cycles:
    """What a core model says of a call of a kernel.

    Attributes
    ----------
    core : str
        LLVM's name of the model.
    cycles, bound : float
        Of the whole kernel: cycles, and those in which its products keep their unit busy.
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
    """Whether an instruction multiplies vectors of integers, on x86 those of bytes."""
    arm = _MULTIPLY.fullmatch(instruction.mnemonic) and instruction.operands.startswith("v")
    return bool(arm or _X86_MULTIPLY.fullmatch(instruction.mnemonic))


def products_in(found: Iterable[Region]) -> Callable[[Instruction], bool]:
    """Return what tells whether an instruction multiplies weights with activations.

    Beside dot products other multiplies put codes on an integer grid or scale sums; where there are none, all do.
    """
    dots = any(_DOT.fullmatch(one.mnemonic) for region in found for one in region.instructions)
    return (lambda one: bool(_DOT.fullmatch(one.mnemonic))) if dots else is_multiply


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


def core_of(device: Device) -> str:
    """Return LLVM's name of the model of a device's core.

    Raises
    ------
    AgqError
        If there is none.
    """
    if device.cpu not in CORES:
        known = ", ".join(CORES)
        raise AgqError(
            f"there is no core model for {device.cpu}, only for {known}: take a device with one of these as --target "
            "(`agq targets`), or measure (--local, or --tracker and --key)"
        )
    return CORES[device.cpu]


def simulate(listing: dict[int, Instruction], count: Count, device: Device, core: str | None = None) -> Cycles:
    """Simulate the blocks that make up 99 % of what a call executed, each as a loop of its own.

    Parameters
    ----------
    listing : dict
        Instructions of the library by address, in order.
    count : Count
        What a call executes.
    device : Device
    core : str, optional
        LLVM's name of a model, instead of that of the device's core.

    Raises
    ------
    AgqError
        If there is no simulator, or none for the device's core.
    """
    core, chosen, executed = core or core_of(device), [], 0
    for region in sorted(regions(listing, count), key=lambda region: -region.executed):
        if executed >= _COVERED * count.instructions:
            break
        chosen.append(region)
        executed += region.executed
    if not chosen:
        raise AgqError("the call executes no instruction of the library")
    is_product = products_in(chosen)
    simulated = list(zip(chosen, _simulate_regions(chosen, core, device, is_product), strict=True))
    loop = _busiest_loop(chosen, is_product)
    inside = [(region, one) for region, one in simulated if region.instructions[0].address in loop]
    cycles, bound = _total(simulated, "cycles"), _total(simulated, "bound")
    loop_cycles, loop_bound = _total(inside, "cycles"), _total(inside, "bound")
    return Cycles(core, cycles, bound, loop_cycles, loop_bound, _limit(inside), executed / count.instructions)


def _total(simulated: list[tuple[Region, _Simulation]], what: str) -> float:
    return sum(region.runs * getattr(one, what) for region, one in simulated)


def _busiest_loop(simulated: list[Region], is_product: Callable[[Instruction], bool]) -> range:
    """Return the addresses of the innermost loop that executes most multiplies."""
    executed = [instruction for region in simulated for instruction in region.instructions]
    executed.sort(key=lambda instruction: instruction.address)

    def multiplies(loop: tuple[int, int]) -> int:
        inside = (region for region in simulated if loop[0] <= region.instructions[0].address <= loop[1])
        return sum(region.runs * sum(map(is_product, region.instructions)) for region in inside)

    first, last = max(innermost_loops(executed), key=multiplies, default=(executed[0].address, executed[-1].address))
    return range(first, last + 1)


def _limit(simulated: list[tuple[Region, _Simulation]]) -> str:
    busy = Counter()
    for region, one in simulated:
        busy.update({unit: region.runs * cycles for unit, cycles in one.busy.items()})
    unit, cycles = busy.most_common(1)[0]
    return f"{unit} {100 * cycles / _total(simulated, 'cycles'):.0f}"


def _simulate_regions(
    found: list[Region], core: str, device: Device, is_product: Callable[[Instruction], bool]
) -> list[_Simulation]:
    comment = "//" if device.machine == "aarch64" else "#"
    parts = []
    for number, region in enumerate(found):
        lines = (_assembly(instruction) for instruction in region.instructions)
        parts += [f"{comment} LLVM-MCA-BEGIN {number}", *lines, f"{comment} LLVM-MCA-END"]
    options = [f"-mtriple={device.machine}", f"-mcpu={core}", f"-iterations={_ITERATIONS}", "-json"]
    report = json.loads(output_of([find_simulator()[0], *options], "\n".join(parts) + "\n"))
    results = {int(result["Name"]): result for result in report["CodeRegions"]}
    resources = report["TargetInfo"]["Resources"]
    return [_simulation(results[number], region, resources, is_product) for number, region in enumerate(found)]


def _simulation(
    result: dict, region: Region, resources: list[str], is_product: Callable[[Instruction], bool]
) -> _Simulation:
    infos = result["InstructionInfoView"]["InstructionList"]
    if len(infos) != len(region.instructions):
        raise AgqError(f"llvm-mca read {len(infos)} of {len(region.instructions)} instructions")
    bound = sum(info["RThroughput"] for info, one in zip(infos, region.instructions, strict=True) if is_product(one))
    summary = result["SummaryView"]
    busy = Counter(decode=summary["TotaluOps"] / summary["DispatchWidth"] / _ITERATIONS)
    for usage in result["ResourcePressureView"]["ResourcePressureInfo"]:
        if usage["InstructionIndex"] == len(infos):  # the sum of all
            busy[_unit(resources[usage["ResourceIndex"]])] += usage["ResourceUsage"]
    return _Simulation(summary["TotalCycles"] / _ITERATIONS, bound, busy)


def _unit(name: str) -> str:
    """Return a unit's name without its core's; units of one kind come as "name.", then their number as a character."""
    kind, _, number = re.sub(r"^\w+?Unit", "", name).partition(".")
    return f"{kind}{ord(number)}" if number else kind


def _assembly(instruction: Instruction) -> str:
    """Return an instruction as an assembler reads it: addresses become a symbol, long fillers the short one."""
    if instruction.mnemonic.startswith("nop") or instruction.operands in ("%ax,%ax", "%esi,%esi"):
        return "nop"
    operands = re.sub(r"[0-9a-f]+ <[^>]*>", "elsewhere", instruction.operands)
    return f"{instruction.mnemonic} {operands}"
