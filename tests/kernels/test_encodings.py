"""Code of instruction sets that no machine of ours limits itself to: an assembler that knows no more than a device."""

import os
import re
import shutil
import subprocess

import pytest
import tvm

from agq_tvm.kernels import activation, linear, linear_float, linear_shifted
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.attention import AttentionKernel, build_attention
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_float import FloatLinearKernel, float_form
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.targets import load_device
from tests.missing import leave_out

# By device: the assembler, what it is told of the features that the device requires, and which of them is new.
DEVICES = {
    "snapdragon-8-gen-1": ("aarch64-linux-gnu-as", ["armv8.2-a", "fp16", "rcpc", "dotprod", "i8mm"], "smmla"),
    "x86-64-avxvnni": (
        "as",
        ["generic64", "popcnt", "movbe", "lzcnt", "bmi", "bmi2", "f16c", "fma", "avx2", "avx_vnni"],
        "vpdpbusd",
    ),
}


def kernels_of(isa) -> dict:
    """Return a kernel of each kind, by name."""
    products = [LinearKernel(rows, 64, 128, bits, 32, True, None, False) for rows in (1, 8) for bits in (4, 8)]
    functions = {kernel.name: linear.build(kernel, isa) for kernel in products}
    shifted = ShiftedKernel(8, 64, 128, "float16")
    floats = FloatLinearKernel(8, 64, 128, 4, 32, "float16", False)
    quantize = QuantizeKernel("rms_norm", 8, 128, 32, "per-token-group", 1e-5)
    attention = AttentionKernel(8, 4, 2, 32, 64)
    return functions | {
        shifted.name: linear_shifted.build(shifted, isa),
        floats.name: linear_float.build(floats, float_form(isa)),
        quantize.name: activation.build(quantize, isa.layout_4bit),
        attention.name: build_attention(attention),
    }


def refused(assembler: str, features: list[str], assembly: str) -> set[str]:
    """Return the names of the instructions that an assembler with these features does not know."""
    command = [assembler, f"-march={'+'.join(features)}", "-o", os.devnull, "-"]
    result = subprocess.run(command, input=assembly, capture_output=True, text=True, timeout=60)
    found = set(re.findall(r"Error: .*?`(?:\{vex\}\s*)?(\w+)", result.stderr))
    assert bool(found) == bool(result.returncode), result.stderr[:500]
    return found


@pytest.mark.parametrize("name", DEVICES)
def test_nothing_but_the_required_features_is_used(name):
    assembler, features, instruction = DEVICES[name]
    if shutil.which(assembler) is None:
        leave_out("what instructions need", f"{assembler} is missing: install binutils for it")
    device = load_device(name)
    functions = kernels_of(INSTRUCTION_SETS[device.instruction_set])
    assembly = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(device.tvm_target()))
    lines = assembly.mod.inspect_source("asm").splitlines()
    # Labels and instructions, without data and what is there for debuggers.
    kept = "\n".join(line for line in lines if not line.startswith("\t.")) + "\n"
    assert refused(assembler, features, kept) == set()
    assert refused(assembler, features[:-1], kept) == {instruction}
    if device.machine == "x86_64":
        assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]", kept)
        lines = [line for line in lines if instruction in line]
        assert lines and all(line.startswith("\t{vex}\t") for line in lines)
