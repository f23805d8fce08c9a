"""Multiply-accumulates for each executed instruction of the Arm kernels, float in and out, counted under emulation.

    python -m benchmarks.instructions [--peers] [--json FILE]
    python -m benchmarks.instructions --write-baseline

256 columns, 2048 channels; the quantization of the activations is counted with the product. The figures are the same
on every machine: executed instructions, not time. Beside them cycles of the product by llvm-mca's models of cores,
against those that its multiplies need: `agq_tvm.tuning.core_model` says what a model leaves out.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.targets import load_device
from agq_tvm.tuning import core_model
from agq_tvm.tuning.core_model import Cycles
from agq_tvm.tuning.disassembly import disassemble, find_disassembler
from benchmarks.instructions import baseline, llama_cpp
from benchmarks.instructions.products import DEVICES, Counted, count, table_products
from benchmarks.tables import RESULTS, aligned, report, write_report

_PACKAGES = ("apache-tvm", "ziglang")
_PRODUCT = ("device", "kernels", "form", "scales", "M")
_HEAD = (*_PRODUCT, "quantize", "multiply", "unpacking", "MAC/instruction", "x W8A8")
_MODEL_HEAD = (*_PRODUCT, "MAC/cycle", "x W8A8", "% of bound", "inner loop", "busiest unit")
_PEER_HEAD = ("device", "llama.cpp", "M", "instructions", "MAC/instruction", "error %")


@dataclass(frozen=True)
class Row:
    """A row of the tables; `cycles` and `unpacking` are None where the tools for them are missing."""

    counted: Counted
    unpacking: int | None = None
    cycles: Cycles | None = None

    @property
    def product_cells(self) -> tuple[str, ...]:
        """Which product it is."""
        product = self.counted.product
        scales = product.scales.removeprefix("per-")
        return (product.device, product.instruction_set, product.form, scales, str(product.rows))

    def count_cells(self, int8: "Row") -> tuple[str, ...]:
        """Return cells of executed instructions, beside those of the same product in 8 bits."""
        counted = self.counted
        counts = (counted.quantize.instructions, counted.multiply.instructions, self.unpacking)
        ratios = (f"{counted.ratio:.2f}", f"{counted.ratio / int8.counted.ratio:.2f}")
        return (*self.product_cells, *("-" if count is None else str(count) for count in counts), *ratios)

    def model_cells(self, int8: "Row") -> tuple[str, ...]:
        """Return cells of simulated cycles, beside those of the same product in 8 bits."""
        cycles, macs = self.cycles, self.counted.product.macs
        figures = (macs / cycles.cycles, int8.cycles.cycles / cycles.cycles)
        shares = (cycles.bound / cycles.cycles, cycles.loop_bound / cycles.loop_cycles)
        cells = (*(f"{figure:.2f}" for figure in figures), *(f"{100 * share:.1f}" for share in shares))
        return (*self.product_cells, *cells, cycles.limit)

    def as_json(self) -> dict:
        """Return its figures."""
        counted = self.counted
        figures = {"quantize": counted.quantize.instructions, "multiply": counted.multiply.instructions}
        cycles = asdict(self.cycles) if self.cycles else None
        ratio = round(counted.ratio, 4)
        return {**asdict(counted.product), **figures, "ratio": ratio, "unpacking": self.unpacking, "model": cycles}


def _row(counted: Counted, modelled: bool) -> Row:
    if not modelled:
        return Row(counted)
    device = load_device(counted.product.device)
    listing = disassemble(counted.library, device)
    unpacking = core_model.unpacking(listing, counted.multiply)
    core = core_model.CORES.get(device.cpu, device.cpu)
    return Row(counted, unpacking, core_model.simulate(listing, counted.multiply, device, core))


def _can_model() -> bool:
    """Whether there are a disassembler and a simulator; if not, it is said aloud."""
    try:
        find_disassembler(load_device(DEVICES[0]))
        core_model.find_simulator()
    except AgqError as error:
        print(f"CYCLES ARE NOT SIMULATED: {error}", file=sys.stderr)
        return False
    return True


def _tables(folder: Path) -> list[Row]:
    rows, modelled = [], _can_model()
    for counted in count(table_products(), folder):
        rows.append(_row(counted, modelled))
        print(counted.product.name, f"{counted.ratio:.2f}", file=sys.stderr)
    pairs = [(row, _int8_of(row, rows)) for row in rows]
    print(aligned([_HEAD, *(row.count_cells(int8) for row, int8 in pairs)]))
    if modelled:
        print()
        print(aligned([_MODEL_HEAD, *(row.model_cells(int8) for row, int8 in pairs)]))
    return rows


def _int8_of(row: Row, rows: list[Row]) -> Row:
    """Return the row of the same product of 8-bit weights and activations."""
    product = row.counted.product
    own = load_device(product.device).instruction_set
    same = replace(product, instruction_set=own, weight_bits=8, activation_bits=8, grid=False)
    return next(other for other in rows if other.counted.product == same)


def _peers(folder: Path) -> list[llama_cpp.Peer]:
    peers = []
    for peer in llama_cpp.count(folder):
        peers.append(peer)
        print(*peer.as_line(), file=sys.stderr)
    print()
    print(aligned([_PEER_HEAD, *(peer.as_line() for peer in peers)]))
    return peers


def _write_baseline(folder: Path) -> None:
    figures = {}
    for device in (*DEVICES, *baseline.X86_DEVICES):
        figures |= baseline.measure(device, folder)
    print("\n".join(baseline.differences(baseline.read_baseline(), figures)) or "nothing changed by more than 2 %")
    baseline.write_baseline(figures)
    print(f"wrote {baseline.BASELINE}", file=sys.stderr)


def main() -> None:
    """Count, print, and write JSON; or renew the baseline."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "instructions.json", metavar="FILE")
    parser.add_argument("--peers", action="store_true", help="build llama.cpp's kernels, and count them as well")
    parser.add_argument("--write-baseline", action="store_true", help="renew what tests compare with, no table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.write_baseline:
            _write_baseline(folder)
            return
        rows = _tables(folder)
        peers = _peers(folder) if arguments.peers else []
    results = {"results": [row.as_json() for row in rows], "peers": [asdict(peer) for peer in peers]}
    simulator = core_model.find_simulator()[1] if rows[0].cycles else None
    write_report(arguments.json, report("benchmarks.instructions", _PACKAGES, llvm_mca=simulator, **results))


if __name__ == "__main__":
    try:
        main()
    except AgqError as error:
        sys.exit(f"benchmarks.instructions: {error}")
