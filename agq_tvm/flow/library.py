"""Build ``model.so`` in a process of its own.

LLVM ends the whole process when it cannot write a file; here that is an exit code of a child, its half-written
files are in a folder that the parent removes, and TVM's memory goes with it. The child says on its standard
output where it is, a line for each step.
"""

import json
import os
import selectors
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.targets import load_device
from agq_tvm.targets.link import exporter

TENSORS = "tensors.json"
_STEPS = 11  # decoder, the pipeline's phases, code, link


@dataclass(frozen=True)
class LibraryRequest:
    """What the child needs to know.

    Attributes
    ----------
    checkpoint, target, output : str
        The checkpoint's directory, the device, and the library to write.
    context : int
    cache : str
        What keys and values are stored as.
    offsets : str or None
        See `agq_tvm.flow.packing.offsets_dtype`.
    scratch : str
        An empty directory for everything temporary; the list of tensors is left there.
    debug_dump : str or None
    schedules : str or None
        A library of tuned schedules; the user's own by default. The shipped one counts, too.
    """

    checkpoint: str
    target: str
    output: str
    context: int
    cache: str
    offsets: str | None
    scratch: str
    debug_dump: str | None
    schedules: str | None = None


def build_library(request: LibraryRequest) -> tuple[list[tuple[str, tuple[int, ...], str]], dict]:
    """Build the library; return (name, shape, dtype) of all caches and parameters, in order, and its schedules.

    These are as `agq_tvm.flow.schedules.Chooser.report` says.

    Raises
    ------
    AgqError
        With the child's last words, if it fails.
    """
    command = [sys.executable, "-m", "agq_tvm.flow.library", json.dumps(asdict(request))]
    errors = Path(request.scratch) / "errors.txt"
    with open(errors, "wb") as log:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=os.environ | {"TMPDIR": request.scratch}
        )
        try:
            _show_steps(child)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
    if child.returncode:
        lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1].removeprefix("agq: ") if lines else f"exit code {child.returncode}"
        raise AgqError(f"cannot compile {request.checkpoint} for {request.target}: {reason}")
    return read_tensors(request)


def read_tensors(request: LibraryRequest) -> tuple[list[tuple[str, tuple[int, ...], str]], dict]:
    """Read the list of tensors and the schedules that the child has left."""
    left = read_json(Path(request.scratch) / TENSORS, "compiled library")
    return [(name, tuple(shape), dtype) for name, shape, dtype in left["tensors"]], left["schedules"]


def _show_steps(child: subprocess.Popen) -> None:
    """Move a bar with every line that the child prints, and its clock in between."""
    with selectors.DefaultSelector() as selector, _bar() as bar:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=0.5):
                bar.refresh()
                continue
            line = child.stdout.readline()
            if not line:
                return
            bar.set_postfix_str(line.decode().strip(), refresh=False)
            bar.update()


def _bar():
    return tqdm(total=_STEPS, desc="compiling", unit="step", file=sys.stderr, leave=False, dynamic_ncols=True)


def linear_format(scheme: Scheme, offsets: str | None):
    """Return how the layers' linears are stored and computed.

    Parameters
    ----------
    scheme : Scheme
    offsets : str or None
        See `agq_tvm.flow.packing.offsets_dtype`.
    """
    from agq_tvm.passes.quantize_linears import LinearFormat

    return LinearFormat(
        scheme.weight_bits,
        scheme.group_size,
        scheme.activation,
        offsets,
        refined=scheme.max_refine > 0,
        four_bit=scheme.four_bit,
        shifts=scheme.shifts,
        mixed=scheme.mixed_bits > 0,
        head_bits=scheme.head_bits,
        grid=scheme.integer_grid,
    )


def _build(request: LibraryRequest) -> None:
    """Do the child's work."""
    from agq_tvm.flow.schedules import Chooser
    from agq_tvm.kernels.attention_form import attention_form
    from agq_tvm.kernels.instruction_sets import instruction_set
    from agq_tvm.kernels.record_library import open_library
    from agq_tvm.models.relax_decoder import build_decoder
    from agq_tvm.passes import pipeline
    from agq_tvm.tvm_seam import Target, relax

    device, checkpoint = load_device(request.target), read_checkpoint(request.checkpoint)
    isa = instruction_set(device.instruction_set, checkpoint.scheme.activation)
    target = Target(device.tvm_target())
    _step("decoder")
    scheme = checkpoint.scheme
    attention = attention_form(isa, request.cache, CODE_BOOKS.get(scheme.attention))
    module = build_decoder(checkpoint.config, request.context, attention, scheme.pruning)
    format = linear_format(checkpoint.scheme, request.offsets)
    dump = Path(request.debug_dump) if request.debug_dump else None
    choose = Chooser(open_library(device.name, request.schedules), isa, device.threads)
    lowered, tensors = pipeline.run(module, target, format, isa, dump, _step, choose)
    _step("code generation")
    executable = relax.build(lowered, target, relax_pipeline=None)
    _step("link")
    executable.export_library(request.output, fcompile=exporter(device), workspace_dir=request.scratch)
    (Path(request.scratch) / TENSORS).write_text(json.dumps({"tensors": tensors, "schedules": choose.report()}))
    _step("done")


def _step(name: str) -> None:
    print(name, flush=True)


def main() -> int:
    """Run as a child: one argument, the request as JSON."""
    try:
        _build(LibraryRequest(**json.loads(sys.argv[1])))
        return 0
    except (AgqError, OSError) as error:
        print(f"agq: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
