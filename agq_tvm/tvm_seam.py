"""TVM's moving parts, imported in one place: releases rename them about every two months."""

import tvm
from tvm import relax, tirx
from tvm.s_tir import Schedule, TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.target import Target

__all__ = ["IRBuilder", "Schedule", "T", "Target", "TensorIntrin", "relax", "tirx", "tvm"]
