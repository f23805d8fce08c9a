"""Small programs for boards, and running what a library has there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from agq_tvm.targets import load_device
from agq_tvm.targets.link import exporter


@I.ir_module
class Add:
    """y = 2 a + b: runs on every board."""

    @T.prim_func(s_tir=True)
    def add(a: T.Buffer((64,), "float32"), b: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        T.func_attr({"global_symbol": "add"})
        for i in T.parallel(64):
            with T.sblock("add"):
                v = T.axis.spatial(64, i)
                y[v] = a[v] * T.float32(2) + b[v]


@I.ir_module
class Dot:
    """y[i] = sum of a[4i..4i+3] * b[4i..4i+3], with the dot product instruction of Armv8.2."""

    @T.prim_func(s_tir=True)
    def dot(a: T.Buffer((16,), "int8"), b: T.Buffer((16,), "int8"), y: T.Buffer((4,), "int32")):
        T.func_attr({"global_symbol": "dot"})
        with T.sblock("dot"):
            y[T.ramp(0, 1, 4)] = T.call_llvm_pure_intrin(
                "llvm.aarch64.neon.sdot.v4i32.v16i8",
                T.broadcast(0, 4),
                a[T.ramp(0, 1, 16)],
                b[T.ramp(0, 1, 16)],
                dtype="int32x4",
            )


@I.ir_module
class Step:
    """A model in small: parameters and caches as tuples, one cache updated in place, its sum returned."""

    @T.prim_func(private=True, s_tir=True)
    def scale(
        x: T.Buffer((4,), "float32"),
        w: T.Buffer((4,), "float16"),
        b: T.Buffer((4,), "float32"),
        position: T.Buffer((1,), "int32"),
        cache: T.Buffer((8, 4), "float32"),
    ):
        for i in range(4):
            with T.sblock("scale"):
                v = T.axis.spatial(4, i)
                cache[position[0], v] = x[v] * T.Cast("float32", w[v]) + b[v]

    @T.prim_func(private=True, s_tir=True)
    def total(cache: T.Buffer((8, 4), "float32"), y: T.Buffer((4,), "float32")):
        for i, j in T.grid(4, 8):
            with T.sblock("total"):
                v, r = T.axis.remap("SR", [i, j])
                with T.init():
                    y[v] = T.float32(0)
                y[v] = y[v] + cache[r, v]

    @R.function
    def main(
        x: R.Tensor((4,), "float32"),
        position: R.Tensor((1,), "int32"),
        caches: R.Tuple(R.Tensor((8, 4), "float32"), R.Tensor((8, 4), "float32")),
        params: R.Tuple(R.Tensor((4,), "float16"), R.Tensor((4,), "float32")),
    ) -> R.Tensor((4,), "float32"):
        cls = Step
        cache = R.call_tir_inplace(
            cls.scale,
            (x, params[0], params[1], position, caches[1]),
            inplace_indices=[4],
            out_ty=R.Tensor((8, 4), "float32"),
        )
        y = R.call_tir(cls.total, (cache,), out_ty=R.Tensor((4,), "float32"))
        return y


def library(module, device_name: str, folder: Path, name: str = "kernel.so") -> str:
    """Compile a module for a device; return the path of the library."""
    device = load_device(device_name)
    path = folder / name
    compiled = tvm.compile(module, target=tvm.target.Target(device.tvm_target()))
    compiled.export_library(str(path), fcompile=exporter(device))
    return str(path)


@contextmanager
def loaded(session, path: str) -> Iterator[Callable[[str], Callable]]:
    """Load a library on a board; give a function that returns those of the library by name.

    They take tensors of this machine; the last one is written.
    """
    session.upload(path)
    modules = [session.load_module(Path(path).name)]

    def function(name: str) -> Callable:
        def call(*operands) -> None:
            there = [tvm.runtime.tensor(operand.numpy(), session.cpu(0)) for operand in operands]
            modules[0][name](*there)
            operands[-1].copyfrom(there[-1].numpy())

        return call

    try:
        yield function
    finally:
        modules.clear()  # a session ends with the last object that it has given
