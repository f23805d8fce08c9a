"""Multiply-accumulates per executed instruction of the Arm kernels, float in and out, counted under emulation.

    python -m benchmarks.instructions

Group size 32, 256 columns, 2048 channels; the quantization of the activations is counted with the product. The
figures are the same on every machine: executed instructions, not time.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tvm

from agq_tvm.errors import AgqError
from agq_tvm.kernels import activation, linear
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.targets import Device, load_device
from agq_tvm.targets.link import exporter
from benchmarks.instructions.counting import Count, count_instructions
from benchmarks.tables import RESULTS, aligned, report, write_report

COLUMNS, CHANNELS, GROUP = 256, 2048, 32
DEVICES = ("raspberry-pi-4", "snapdragon-870")
ROWS = (1, 128)


@dataclass(frozen=True)
class Case:
    """A product on a device: what it executes, with the quantization of its input."""

    device: str
    rows: int
    activation: str
    activation_bits: int
    quantize: Count
    multiply: Count

    @property
    def ratio(self) -> float:
        """Multiply-accumulates for each instruction."""
        return self.rows * COLUMNS * CHANNELS / (self.quantize.instructions + self.multiply.instructions)


def count(device: Device, rows: int, mode: str, bits: int, folder: Path) -> Case:
    """Compile the two kernels of a product for a device and count what they execute."""
    isa = instruction_set(device.instruction_set)
    kernel = LinearKernel(rows, COLUMNS, CHANNELS, 4, GROUP, mode == "per-token-group", None, False, bits)
    quantize = QuantizeKernel("plain", rows, CHANNELS, GROUP, mode, bits=bits)
    functions = {
        kernel.name: linear.build(kernel, isa),
        quantize.name: activation.build(quantize, isa.layout_4bit),
    }
    module = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    library = folder / f"{device.name}-{kernel.name}-{mode}.so"
    target = tvm.target.Target(device.tvm_target())
    tvm.compile(module, target=target).export_library(str(library), fcompile=exporter(device))
    counts = [
        count_instructions(library, name, [_tensor(buffer) for buffer in function.params], device)
        for name, function in reversed(functions.items())
    ]
    return Case(device.name, rows, mode, bits, *counts)


def _tensor(buffer) -> str:
    return f"{buffer.dtype}:{'x'.join(str(int(extent)) for extent in buffer.shape)}"


def as_line(case: Case) -> tuple[str, ...]:
    """Return a row of the table."""
    counts = (str(case.quantize.instructions), str(case.multiply.instructions))
    return (case.device, str(case.rows), case.activation, str(case.activation_bits), *counts, f"{case.ratio:.2f}")


def main() -> None:
    """Count, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "instructions.json", metavar="FILE")
    arguments = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for name in DEVICES:
            for bits in (8, 4):
                for rows in ROWS:
                    for mode in ("per-token-group", "per-token"):
                        cases.append(count(load_device(name), rows, mode, bits, Path(folder)))
                        print(*as_line(cases[-1]), file=sys.stderr)
    head = ("device", "M", "activation scales", "bits", "quantize", "multiply", "MAC/instruction")
    print(aligned([head, *map(as_line, cases)]))
    rows = [dict(zip(head, as_line(case), strict=True)) for case in cases]
    write_report(arguments.json, report("benchmarks.instructions", ("apache-tvm", "ziglang"), results=rows))


if __name__ == "__main__":
    try:
        main()
    except AgqError as error:
        sys.exit(f"benchmarks.instructions: {error}")
