"""What a compiled library consists of, and which of it runs: instructions, blocks that run equally often, loops."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.targets import Device
from agq_tvm.tuning.block_counts import Count

_LINE = re.compile(r"\s*([0-9a-f]+):\s+(?:(?:data16|cs|ds|bnd|notrack) )*(\S+)\s*(.*)")
_BRANCH = re.compile(r"b(\.\w+)?|cbn?z|tbn?z|j\w+")
_COMMENT = re.compile(r"//.*|\s#\s.*")
_TARGET = re.compile(r"\b([0-9a-f]+) <")
_LEAVES = ("b", "br", "ret", "jmp")
_TIME_LIMIT = 600.0
_PAGE = 4096


@dataclass(frozen=True)
class Instruction:
    """An instruction of a library.

    Attributes
    ----------
    address : int
        Its offset in the library.
    mnemonic, operands : str
        As ``objdump`` writes them, without comments.
    target : int or None
        Where it jumps to, if it is a direct jump.
    """

    address: int
    mnemonic: str
    operands: str
    target: int | None

    @property
    def backward(self) -> bool:
        """Whether it closes a loop."""
        return self.target is not None and self.target <= self.address


@dataclass(frozen=True)
class Region:
    """Neighbouring instructions that run equally often: what a loop repeats, or what stands between loops."""

    instructions: tuple[Instruction, ...]
    runs: int

    @property
    def executed(self) -> int:
        """Instructions that are executed in it."""
        return len(self.instructions) * self.runs


def find_disassembler(device: Device) -> str:
    """Return the path of the disassembler for a device's architecture.

    Raises
    ------
    AgqError
        If it is not installed.
    """
    name = f"{device.machine}-linux-gnu-objdump"
    tool = shutil.which(name)
    if tool is None:
        package = f"binutils-{device.machine.replace('_', '-')}-linux-gnu"
        raise AgqError(f"disassembling needs {name}: install it with: apt-get install {package}")
    return tool


def disassemble(library: Path, device: Device) -> dict[int, Instruction]:
    """Return the instructions of a library by address, in order."""
    text = output_of([find_disassembler(device), "-d", "--no-show-raw-insn", str(library)])
    found = (_instruction(match) for line in text.splitlines() if (match := _LINE.fullmatch(line)))
    return {instruction.address: instruction for instruction in found}


def output_of(command: list[str], text: str | None = None) -> str:
    """Return what a program prints, given `text` on its standard input.

    Raises
    ------
    AgqError
        If it fails, or does not end in time.
    """
    try:
        result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIME_LIMIT)
    except subprocess.TimeoutExpired:
        raise AgqError(f"{command[0]} did not end within {_TIME_LIMIT:.0f} s") from None
    if result.returncode:
        raise AgqError(f"{command[0]} failed: {result.stderr.strip()[:300]}")
    return result.stdout


def _instruction(match: re.Match) -> Instruction:
    address, mnemonic, operands = match.groups()
    target = _TARGET.search(operands) if _BRANCH.fullmatch(mnemonic) else None
    operands = _COMMENT.sub("", operands).strip()
    return Instruction(int(address, 16), mnemonic, operands, int(target[1], 16) if target else None)


def regions(listing: dict[int, Instruction], count: Count) -> list[Region]:
    """Return what a call executes of a library, cut wherever the number of runs changes and at loops' ends.

    QEMU's blocks overlap where something jumps into the middle of one, and end at its limits: so runs are summed for
    each instruction.
    """
    order = list(listing)
    place = {address: number for number, address in enumerate(order)}
    runs = {}
    for at, (size, times) in count.blocks.items():
        if at in place:
            inside = order[place[at] : place[at] + size]
            for address in inside[: -1 if size > 1 and _on_two_pages(place[inside[-1]], order) else None]:
                runs[address] = runs.get(address, 0) + times
    starts = {instruction.target for address in runs if (instruction := listing[address]).backward}
    found, current = [], []
    for address in sorted(runs):
        if current and (address in starts or _cut(current[-1], listing[address], runs, place)):
            found.append(Region(tuple(current), runs[current[0].address]))
            current = []
        current.append(listing[address])
    return [*found, Region(tuple(current), runs[current[0].address])] if current else found


def _on_two_pages(place: int, order: list[int]) -> bool:
    """Whether an instruction of x86 lies on two pages: QEMU counts it for the block before, and runs it on its own."""
    following = order[place + 1] if place + 1 < len(order) else order[place]
    return (following - 1) // _PAGE > order[place] // _PAGE


def _cut(last: Instruction, following: Instruction, runs: dict[int, int], place: dict[int, int]) -> bool:
    apart = place[following.address] != place[last.address] + 1 or runs[following.address] != runs[last.address]
    return apart or last.backward or last.mnemonic in _LEAVES


def innermost_loops(instructions: Iterable[Instruction]) -> list[tuple[int, int]]:
    """Return the first and the last address of each loop that has no other inside."""
    loops = {(instruction.target, instruction.address) for instruction in instructions if instruction.backward}
    return sorted(loop for loop in loops if not any(_inside(other, loop) for other in loops))


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]
