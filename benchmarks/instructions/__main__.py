"""Multiply-accumulates for each executed instruction of the Arm kernels, float in and out, counted under emulation.

    python -m benchmarks.instructions [--peers] [--json FILE]
    python -m benchmarks.instructions --write-baseline

256 columns, 2048 channels; the quantization of the activations is counted with the product. The figures are the same
on every machine: executed instructions, not time. Beside them cycles of the product by llvm-mca's models of cores,
against those that its multiplies need: `benchmarks.instructions.core_model` says what a model leaves out.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.targets import load_device
from benchmarks.instructions import baseline, core_model, llama_cpp
from benchmarks.instructions.core_model import Cycles
from benchmarks.instructions.disassembly import disassemble, find_disassembler
from benchmarks.instructions.products import DEVICES, Counted, count, table_products
from benchmarks.tables import RESULTS, aligned, report, write_report

_PACKAGES = ("apache-tvm", "ziglang")
_HEAD = ("device", "kernels", "form", "scales", "M", "quantize", "multiply", "MAC/instr")
_MODEL_HEAD = ("unpack/MAC", "MAC/cycle", "of bound %", "loop %", "busiest %")
_PEER_HEAD = ("device", "llama.cpp", "M", "instructions", "MAC/instr", "error %")


@dataclass(frozen=True)
class Row:
    """A row of the table; `cycles` and `unpacking` are None where the tools for them are missing."""

    counted: Counted
    unpacking: int | None = None
    cycles: Cycles | None = None

    def as_line(self) -> tuple[str, ...]:
        """Return its cells."""
        product, counted = self.counted.product, self.counted
        scales = product.scales.removeprefix("per-")
        line = (product.device, product.instruction_set, product.form, scales, str(product.rows))
        line += (str(counted.quantize.instructions), str(counted.multiply.instructions), f"{counted.ratio:.2f}")
        if self.cycles is None:
            return (*line, *["-"] * len(_MODEL_HEAD))
        cycles = self.cycles
        shares = (100 * cycles.bound / cycles.cycles, 100 * cycles.loop_bound / cycles.loop_cycles)
        line += (f"{self.unpacking / product.macs:.3f}", f"{product.macs / cycles.cycles:.2f}")
        return (*line, *(f"{share:.0f}" for share in shares), cycles.limit)

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
    return Row(counted, unpacking, core_model.simulate(listing, counted.multiply, device))


def _can_model() -> bool:
    """Whether there are a disassembler and a simulator; if not, it is said aloud."""
    try:
        find_disassembler(load_device(DEVICES[0]))
        core_model.find_simulator()
    except AgqError as error:
        print(f"CYCLES ARE NOT SIMULATED: {error}", file=sys.stderr)
        return False
    return True


def _table(folder: Path) -> list[Row]:
    rows, modelled = [], _can_model()
    for counted in count(table_products(), folder):
        rows.append(_row(counted, modelled))
        print(*rows[-1].as_line(), file=sys.stderr)
    print(aligned([(*_HEAD, *_MODEL_HEAD), *(row.as_line() for row in rows)]))
    return rows


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
        rows = _table(folder)
        peers = _peers(folder) if arguments.peers else []
    results = {"results": [row.as_json() for row in rows], "peers": [asdict(peer) for peer in peers]}
    simulator = core_model.find_simulator()[1] if rows[0].cycles else None
    write_report(arguments.json, report("benchmarks.instructions", _PACKAGES, llvm_mca=simulator, **results))


if __name__ == "__main__":
    try:
        main()
    except AgqError as error:
        sys.exit(f"benchmarks.instructions: {error}")
