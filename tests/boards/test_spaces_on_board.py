"""Points of the design spaces on emulated boards: products are exact."""

import numpy as np
import pytest
import tvm

from agq_tvm.kernels import linear_grid
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.targets import load_device
from tests.boards import kernels
from tests.boards.conftest import BOARDS
from tests.kernels.grid_operands import random_grid
from tests.kernels.operands import random_operands
from tests.kernels.spaces import GRIDS, PRODUCTS, build_all

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("device", BOARDS)
def test_all_points_of_products_are_exact(boards, tmp_path, device):
    isa = instruction_set(load_device(device).instruction_set)
    grids = [kernel for kernel in GRIDS if linear_grid.applies(kernel, isa)]
    built = build_all(PRODUCTS + grids, isa)
    module = tvm.IRModule({name: func for name, (_, func) in built.items()})
    path = kernels.library(module, device, tmp_path, "points.so")
    with boards.session(device) as session, kernels.loaded(session, path) as function:
        for name, (kernel, _) in built.items():
            operands = (random_grid if kernel in grids else random_operands)(kernel, 1).integer_form()
            got = operands.run(function(name), isa)
            np.testing.assert_array_equal(got, operands.expected(), err_msg=f"{kernel.name} {name}")
