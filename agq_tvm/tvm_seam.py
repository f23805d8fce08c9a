"""TVM's moving parts, imported in one place: releases rename them about every two months."""

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.s_tir import Schedule, TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.target import Target
from tvm_ffi import StructuralKey

from agq_tvm.errors import AgqError

tvm_ffi.register_error(AgqError)  # raised inside a pass, it comes out as itself and not as a RuntimeError

__all__ = ["IRBuilder", "Schedule", "StructuralKey", "T", "Target", "TensorIntrin", "relax", "tirx", "tvm"]
