"""The matrix products that are counted: compiled for a device, run under emulation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tvm

from agq_tvm.kernels import activation, linear_grid, tunable
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.targets import Device, load_device
from agq_tvm.targets.link import exporter
from agq_tvm.tuning.block_counts import Count, count_instructions

COLUMNS, CHANNELS = 256, 2048
DEVICES = ("raspberry-pi-4", "snapdragon-870", "snapdragon-8-gen-1")
ROWS = (1, 128)
FORMS = ((4, 8), (4, 4), (8, 8))
"""Bits of weights and activations."""
PAPER = ("raspberry-pi-4", "neon-paper")
"""A device, and the instruction set with the Agile-Quant paper's multiplier for it."""


@dataclass(frozen=True)
class Product:
    """A matrix product of 256 columns and 2048 channels, with the quantization of its input.

    Attributes
    ----------
    device, instruction_set : str
    rows : int
    scales : str
        Of the activations: ``"per-token-group"`` or ``"per-token"``.
    weight_bits, activation_bits : int
    group : int
        Channels that share a scale of weights.
    grid : bool
        Whether 4-bit weights are on an integer grid.
    """

    device: str
    instruction_set: str
    rows: int
    scales: str
    weight_bits: int
    activation_bits: int
    group: int = 32
    grid: bool = False

    @property
    def form(self) -> str:
        """E.g. ``"W4A8 g32"``."""
        return f"W{self.weight_bits}A{self.activation_bits} g{self.group}{' grid' if self.grid else ''}"

    @property
    def name(self) -> str:
        """What it is in a baseline."""
        return f"{self.device} {self.instruction_set} {self.form} {self.scales} M={self.rows}"

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.rows * COLUMNS * CHANNELS

    @property
    def linear(self) -> LinearKernel | GridKernel:
        """The product."""
        per_group = self.scales == "per-token-group"
        shape = (self.rows, COLUMNS, CHANNELS)
        if self.grid:
            isa = instruction_set(self.instruction_set)
            return linear_grid.choose(isa, *shape, self.group, False, self.activation_bits)
        return LinearKernel(*shape, self.weight_bits, self.group, per_group, None, False, self.activation_bits)

    @property
    def quantize(self) -> QuantizeKernel:
        """What makes the codes that it multiplies."""
        summed = CHANNELS if isinstance(self.linear, GridKernel) else self.group
        return QuantizeKernel("plain", self.rows, CHANNELS, summed, self.scales, bits=self.activation_bits)

    def functions(self) -> dict:
        """Return the two kernels as PrimFuncs by name, the quantization first."""
        isa = instruction_set(self.instruction_set)
        return {
            self.quantize.name: activation.build(self.quantize, isa.layout_4bit),
            self.linear.name: tunable.build(self.linear, isa),
        }


@dataclass(frozen=True)
class Counted:
    """A product, its library, and what each of its kernels executes."""

    product: Product
    library: Path
    quantize: Count
    multiply: Count

    @property
    def ratio(self) -> float:
        """Multiply-accumulates for each instruction."""
        return self.product.macs / (self.quantize.instructions + self.multiply.instructions)


def table_products() -> list[Product]:
    """Return the products of the table: every form in groups of 32, prefill in groups of 128, and integer grids."""
    found = []
    for device in DEVICES:
        own = load_device(device).instruction_set
        forms = [(own, *form) for form in FORMS]
        forms += [(PAPER[1], 4, 4)] if device == PAPER[0] else []
        for (isa, *bits), rows, scales in product(forms, ROWS, ("per-token-group", "per-token")):
            found.append(Product(device, isa, rows, scales, *bits))
        found += [Product(device, own, ROWS[-1], "per-token-group", *bits, group=128) for bits in FORMS]
        if instruction_set(own).grids:
            found += [Product(device, own, rows, "per-token", 4, 8, grid=True) for rows in ROWS]
    return found


def compile_library(functions: dict, device: Device, path: Path) -> Path:
    """Compile PrimFuncs by name into a library for a device."""
    module = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    target = tvm.target.Target(device.tvm_target())
    tvm.compile(module, target=target).export_library(str(path), fcompile=exporter(device))
    return path


def count(products: Iterable[Product], folder: Path) -> Iterator[Counted]:
    """Compile products and count what they execute, one by one.

    Parameters
    ----------
    products : iterable of Product
    folder : Path
        For the libraries.
    """
    for number, one in enumerate(products):
        device, functions = load_device(one.device), one.functions()
        library = compile_library(functions, device, folder / f"{number}.so")
        counts = [
            count_instructions(library, name, [tensor_of(buffer) for buffer in function.params], device)
            for name, function in functions.items()
        ]
        yield Counted(one, library, *counts)


def tensor_of(buffer) -> str:
    """Describe a parameter of a PrimFunc, as the counter takes it."""
    return f"{buffer.dtype}:{'x'.join(str(int(extent)) for extent in buffer.shape)}"
