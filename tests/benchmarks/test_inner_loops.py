"""The inner loops are code of the cores they are for, and do what their sums say."""

import os
import re
import shutil
import subprocess

import pytest

from benchmarks.inner_loops import arm_loops, prefill_loops, x86_loops
from tests.missing import leave_out

LOOPS = (*arm_loops(), *prefill_loops(), *x86_loops())
ASSEMBLERS = {
    "cortex-a72": ("aarch64-linux-gnu-as", "-march=armv8-a"),
    "neoverse-n1": ("aarch64-linux-gnu-as", "-march=armv8.2-a+dotprod"),
    "neoverse-n2": ("aarch64-linux-gnu-as", "-march=armv8.2-a+i8mm"),
    "cortex-x2": ("aarch64-linux-gnu-as", "-march=armv8.2-a+i8mm"),
    "haswell": ("as", "-march=generic64+avx2"),
    "znver4": ("as", "-march=generic64+avx512bw+avx512_vnni"),
}
PRODUCTS = {"smlal": 8, "smlal2": 8, "smull": 8, "smull2": 8, "sdot": 16, "smmla": 32, "vpmaddubsw": 32, "vpdpbusd": 64}


@pytest.mark.parametrize("core", ASSEMBLERS)
def test_loops_are_code_of_their_cores(core):
    assembler, march = ASSEMBLERS[core]
    if shutil.which(assembler) is None:
        leave_out(f"inner loops of {core}", f"{assembler} is missing: install binutils for it")
    text = "\n".join(line for loop in LOOPS if core in loop.cores for line in loop.lines)
    result = subprocess.run(
        [assembler, march, "-o", os.devnull, "-"], input=text + "\n", capture_output=True, text=True
    )
    assert text and result.returncode == 0, result.stderr[:500]


def test_products_are_those_of_the_multiplies():
    counted = {}
    for loop in LOOPS:
        names = [re.split(r"\s", line)[0] for line in loop.lines]
        if any(name in PRODUCTS for name in names):
            counted[loop.name, loop.cores] = sum(PRODUCTS.get(name, 0) for name in names), loop.products
    assert len(counted) == 14
    assert all(products == expected for products, expected in counted.values()), counted
