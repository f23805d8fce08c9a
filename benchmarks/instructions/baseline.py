"""A performance gate that does not depend on the machine: instructions of the main kernels against committed ones.

Arm: what a kernel executes under emulation. x86: instructions for each multiply in the innermost loop with most of
them, from the disassembly. The compilers are pinned, so the figures change when kernels do.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import write_json
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.targets import load_device
from agq_tvm.tuning.block_counts import count_instructions
from agq_tvm.tuning.disassembly import Instruction, disassemble, innermost_loops
from benchmarks.instructions.products import DEVICES, Product, compile_library, tensor_of
from benchmarks.tables import versions

BASELINE = Path(__file__).with_name("baseline.json")
RENEW = "python -m benchmarks.instructions --write-baseline"
TOLERANCE = 0.02
X86_DEVICES = ("x86-64-avx512vnni", "x86-64-xeon", "x86-64-avx2")

_X86_MULTIPLY = re.compile(r"vpdpb\w+|vpmaddubsw")


def gated_products(device: str) -> list[Product]:
    """Return the products whose kernels are gated: decode and prefill, and forms that have kernels of their own."""
    isa = instruction_set(load_device(device).instruction_set)
    forms = [(4, 8, 1), (4, 8, 128), (8, 8, 1), (8, 8, 128)]
    forms += [(4, 4, 128)] if isa.multiply_4x4 else []
    products = [
        Product(device, isa.name, rows, "per-token-group", weight_bits, activation_bits)
        for weight_bits, activation_bits, rows in forms
    ]
    grids = [Product(device, isa.name, rows, "per-token", 4, 8, grid=True) for rows in (1, 128) if isa.grids]
    return products + grids


def measure(device: str, folder: Path) -> dict[str, float]:
    """Return the figures of a device's kernels by name.

    Parameters
    ----------
    device : str
        One of `DEVICES` or `X86_DEVICES`.
    folder : Path
        For compiled libraries.

    Raises
    ------
    AgqError
        If the emulator or the disassembler is missing.
    """
    return _executed(device, folder) if device in DEVICES else _loops(device, folder)


def _executed(name: str, folder: Path) -> dict[str, float]:
    device, functions = load_device(name), {}
    for product in gated_products(name):
        functions |= product.functions()
    library = compile_library(functions, device, folder / f"{name}.so")
    figures = {}
    for kernel, function in functions.items():
        counted = count_instructions(library, kernel, [tensor_of(buffer) for buffer in function.params], device)
        figures[f"{name} {kernel}"] = counted.instructions
    return figures


def _loops(name: str, folder: Path) -> dict[str, float]:
    device, figures = load_device(name), {}
    functions = {product.linear.name: product.functions()[product.linear.name] for product in gated_products(name)}
    for kernel, function in functions.items():
        library = compile_library({kernel: function}, device, folder / f"{name}.so")
        instructions, multiplies = inner_loop(disassemble(library, device).values())
        figures[f"{name} {kernel}, per multiply"] = round(instructions / multiplies, 3)
    return figures


def inner_loop(instructions: Iterable[Instruction]) -> tuple[int, int]:
    """Return how many instructions, and multiplies of bytes, the innermost loop with most multiplies has, on x86.

    Raises
    ------
    AgqError
        If no loop multiplies.
    """
    instructions = list(instructions)
    counts = []
    for first, last in innermost_loops(instructions):
        inside = [one for one in instructions if first <= one.address <= last]
        multiplies = sum(bool(_X86_MULTIPLY.fullmatch(one.mnemonic)) for one in inside)
        counts.append((len(inside), multiplies))
    instructions, multiplies = max(counts, key=lambda loop: loop[1], default=(0, 0))
    if not multiplies:
        raise AgqError("no innermost loop multiplies bytes: the instruction set's intrinsic is not used")
    return instructions, multiplies


def read_baseline() -> dict[str, float]:
    """Return the committed figures by name."""
    return json.loads(BASELINE.read_text(encoding="utf-8"))["figures"]


def write_baseline(figures: dict[str, float]) -> None:
    """Commit figures to the baseline."""
    write_json(BASELINE, {"versions": versions("apache-tvm", "ziglang"), "figures": figures})


def differences(baseline: dict[str, float], figures: dict[str, float]) -> list[str]:
    """Say what is more than 2 % worse or better than the baseline, and which figures only one of the two has."""
    found = []
    for name in sorted(baseline.keys() | figures.keys()):
        before, now = baseline.get(name), figures.get(name)
        if before is None or now is None:
            found.append(f"{name}: {'is new' if before is None else 'is gone'}")
        elif abs(now - before) > TOLERANCE * before:
            change = f"{100 * (now / before - 1):+.1f} % instructions"
            found.append(f"{name}: {'SLOWER' if now > before else 'faster'}, {before} -> {now}, {change}")
    return found
