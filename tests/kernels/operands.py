"""Operands of a matrix product and its exact result, computed by numpy on plain [M, K] and [N, K] codes."""

from dataclasses import dataclass

import numpy as np
import tvm

from agq_tvm.flow.packing import pack_codes
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.layout import K_BLOCK, Layout
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.targets import Device, load_device
from agq_tvm.targets.detect import cpu_features, machine, missing_features
from tests.missing import leave_out

DEVICES = {
    "avx512vnni": "x86-64-avx512vnni",
    "avx512vnni-xeon": "x86-64-xeon",
    "avxvnni": "x86-64-avxvnni",
    "avx2": "x86-64-avx2",
    "generic": "generic-x86-64",
    "neon": "raspberry-pi-4",
    "neon-paper": "raspberry-pi-4",
    "dotprod": "snapdragon-870",
    "i8mm": "snapdragon-8-gen-1",
}

STAND_INS = {"avxvnni": "x86-64-avx512vnni"}
"""Devices that run the kernels of an instruction set in another encoding of the same instructions."""

LIMIT = {8: 127, 4: 7}
"""The largest activation code, by its bits."""


def target_of(isa: str) -> tvm.target.Target:
    """Return TVM's target of the device that stands for an instruction set."""
    return tvm.target.Target(load_device(DEVICES[isa]).tvm_target())


def device_here(isa: str) -> Device | None:
    """Return the device of an instruction set, or its stand-in, whichever this machine is like; None for neither."""
    names = (DEVICES[isa], STAND_INS.get(isa, DEVICES[isa]))
    devices = [load_device(name) for name in names]
    return next((device for device in devices if not missing_features(device, cpu_features(), machine())), None)


def runs_here(isa: str) -> bool:
    """Tell whether this machine executes an instruction set."""
    return device_here(isa) is not None


def native(isa: str) -> InstructionSet:
    """Return an instruction set that this machine executes; if it does not, leave the calling test out."""
    if not runs_here(isa):
        leave_out(f"code of {isa}", "this processor lacks what it needs")
    return INSTRUCTION_SETS[isa]


def compiled(func, isa: str):
    """Compile one PrimFunc for this machine and return it as something to call."""
    name = str(func.attrs["global_symbol"])
    target = tvm.target.Target(device_here(isa).tvm_target())
    return tvm.compile(tvm.IRModule({name: func}), target=target)[name]


@dataclass
class Operands:
    """Codes in their plain order, and everything that a kernel reads.

    Attributes
    ----------
    x : int8 [R, K]
        R is M, or twice that for two terms.
    q : uint8 [N, K]
    sx, scales, offsets, bias
        float arrays [R, G or 1], [N, G], [N, G] or None, [N] or None.
    """

    kernel: LinearKernel
    x: np.ndarray
    q: np.ndarray
    sx: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    bias: np.ndarray | None

    def _grouped(self, codes: np.ndarray) -> np.ndarray:
        full = np.zeros((len(codes), self.kernel.groups * self.kernel.group_size), "int64")
        full[:, : self.kernel.channels] = codes
        return full.reshape(len(codes), self.kernel.groups, -1)

    def sums(self) -> np.ndarray:
        """Return Σ x of every group, int64 [R, G]."""
        return self._grouped(self.x).sum(-1)

    def dots(self) -> np.ndarray:
        """Return Σ x·q of every group, int64 [R, G, N]."""
        return np.einsum("mgk,ngk->mgn", self._grouped(self.x), self._grouped(self.q))

    def expected(self) -> np.ndarray:
        """Return the contract's result in float64, [M, N]."""
        zero = 0 if self.offsets is not None else {4: 8, 8: 128}[self.kernel.bits]
        sums = self.sums()[:, :, None]
        y = (self.dots() - zero * sums) * self.scales.T[None].astype("float64")
        if self.offsets is not None:
            y = y + sums * self.offsets.T[None].astype("float64")
        y = (y * self.sx[:, :, None]).sum(1)
        y = y.reshape(self.kernel.terms, self.kernel.rows, -1).sum(0)
        return y if self.bias is None else y + self.bias

    def arrays(self, isa: InstructionSet) -> list[np.ndarray]:
        """Return the kernel's inputs, packed, in its order."""
        layout: Layout = isa.layout(self.kernel.bits)
        padded = self.kernel.groups * self.kernel.group_size
        x = np.zeros((self.kernel.code_rows, padded), "int8")
        x[:, : self.kernel.channels] = self.x
        shape = (self.kernel.code_rows, padded // K_BLOCK, layout.steps, 2, layout.depth)
        arrays = [
            np.ascontiguousarray(x.reshape(shape).transpose(1, 0, 2, 3, 4)),
            self.sx,
            self.sums().astype("int32"),
            pack_codes(self.q, self.kernel.group_size, layout),
            layout.pack_columns(self.scales),
        ]
        if self.offsets is not None:
            arrays.append(layout.pack_columns(self.offsets))
        if self.bias is not None:
            arrays.append(np.ascontiguousarray(layout.pack_columns(self.bias[:, None])[:, 0]))
        return arrays

    def run(self, function, isa: InstructionSet) -> np.ndarray:
        """Call a compiled kernel: float32 [M, N]."""
        layout = isa.layout(self.kernel.bits)
        width = layout.tiles(self.kernel.columns) * layout.width
        # Full of NaN, so that an element that is not written shows.
        out = tvm.runtime.tensor(np.full((self.kernel.rows, width), np.nan, "float32"))
        function(*(tvm.runtime.tensor(array) for array in self.arrays(isa)), out)
        return out.numpy()[:, : self.kernel.columns]

    def integer_form(self) -> "Operands":
        """Return the same codes with all scales 1 and no offsets of their own, so that results are integers.

        The sum over all groups stays below 2^24 and is therefore exact in float32.
        """
        assert self.kernel.terms * abs(self.dots()).sum(1).max() < 1 << 24
        offsets = None if self.offsets is None else np.zeros_like(self.offsets)
        bias = None if self.bias is None else np.zeros_like(self.bias)
        ones = np.ones_like
        return Operands(self.kernel, self.x, self.q, ones(self.sx), ones(self.scales), offsets, bias)


def random_operands(kernel: LinearKernel, seed: int = 0) -> Operands:
    """Draw codes over their whole range, and scales and offsets of either sign."""
    rng, limit = np.random.default_rng(seed), LIMIT[kernel.activation_bits]
    R, N, K, G = kernel.code_rows, kernel.columns, kernel.channels, kernel.groups
    return Operands(
        kernel,
        rng.integers(-limit, limit + 1, (R, K)).astype("int8"),
        rng.integers(0, 1 << kernel.bits, (N, K)).astype("uint8"),
        rng.uniform(0.5, 2, (R, G if kernel.per_group else 1)).astype("float32"),
        rng.standard_normal((N, G)).astype("float16"),
        rng.standard_normal((N, G)).astype(kernel.offsets) if kernel.offsets else None,
        rng.standard_normal(N).astype("float32") if kernel.bias else None,
    )


def corner_operands(kernel: LinearKernel) -> dict[str, Operands]:
    """All activations and all weights at the ends of their ranges, a row of zeros, and alternating signs."""
    base, top, limit = random_operands(kernel), (1 << kernel.bits) - 1, LIMIT[kernel.activation_bits]
    corners = {}
    for x in (-limit, limit):
        for q in (0, top):
            corners[f"x={x} q={q}"] = (np.full_like(base.x, x), np.full_like(base.q, q))
    alternating = np.where(np.arange(kernel.channels) % 2, limit, -limit).astype("int8")
    corners["alternating"] = (np.broadcast_to(alternating, base.x.shape), np.full_like(base.q, top))
    zero_row = base.x.copy()
    zero_row[0] = 0
    corners["zero row"] = (zero_row, base.q)
    return {
        name: Operands(kernel, np.ascontiguousarray(x), q, base.sx, base.scales, base.offsets, base.bias)
        for name, (x, q) in corners.items()
    }
