"""A checkpoint compiled in this process, with few functions and without linking: seconds instead of a bundle."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import tvm
from tvm import relax

from agq_tvm.flow.library import linear_format
from agq_tvm.flow.packing import Packer, offsets_dtype
from agq_tvm.kernels.attention_form import attention_form
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.models import relax_decoder
from agq_tvm.models.decoder import PREFILL_BUCKETS
from agq_tvm.passes import pipeline
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.runtime.bundle import CACHES
from tests.kernels.operands import target_of

ROWS = min(PREFILL_BUCKETS)


def functions(rows: int) -> list[tuple[str, int, bool]]:
    """List the functions of `function_names` for decoding and one bucket."""
    return [("decode", 1, True), (f"prefill_{rows}", rows, False), (f"prefill_{rows}_all", rows, True)]


FUNCTIONS = functions(ROWS)


class CompiledModel:
    """Stands for a bundle, for the session on its board, and for that board.

    Parameters
    ----------
    checkpoint : Checkpoint
    isa : str
        An instruction set that this machine has.
    context : int
    monkeypatch : pytest.MonkeyPatch
        To leave out most functions.
    rows : int
        The only bucket.
    cache : str
        What keys and values are stored as.
    """

    def __init__(
        self, checkpoint: Checkpoint, isa: str, context: int, monkeypatch, rows: int = ROWS, cache: str = "float16"
    ):
        monkeypatch.setattr(relax_decoder, "function_names", lambda: functions(rows))
        offsets, scheme = offsets_dtype(checkpoint), checkpoint.scheme
        format = linear_format(scheme, offsets)
        target, kernels = target_of(isa), instruction_set(isa, scheme.activation)
        attention = attention_form(kernels, cache, CODE_BOOKS.get(scheme.attention))
        module = relax_decoder.build_decoder(checkpoint.config, context, attention, scheme.pruning)
        self.lowered, tensors = pipeline.run(module, target, format, kernels)
        executable = relax.build(self.lowered, target, relax_pipeline=None)
        self.library = executable.jit()
        self._machine = relax.VirtualMachine(self.library, tvm.cpu())
        packer = Packer(checkpoint, kernels, context, offsets)
        self.caches = [tensor for tensor in tensors if tensor[0].endswith(CACHES)]
        arrays = [np.zeros(shape, dtype) for _, shape, dtype in self.caches]
        arrays += [packer.array(name) for name, _, _ in tensors[len(self.caches) :]]
        for (name, shape, dtype), array in zip(tensors, arrays, strict=True):
            assert (array.shape, str(array.dtype)) == (shape, dtype), name
        self.parameters = [SimpleNamespace(name=name, dtype=dtype) for name, _, dtype in tensors[len(self.caches) :]]
        self._tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
        self._packed = tvm.runtime.convert(self._tensors)
        model = {"vocab_size": checkpoint.config.vocab_size, "eos_token_ids": []}
        self.manifest = {"context": context, "buckets": [rows], "model": model, "device": {"instruction_set": isa}}
        if scheme.pruning:
            self.manifest["pruning"] = asdict(scheme.pruning) | {"layers": list(scheme.pruning.layers)}

    def run(self, function: str, tokens: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See `agq_tvm.runtime.engine.Session.run`."""
        inputs = map(tvm.runtime.tensor, (tokens, positions, lengths))
        return self._machine[function](*inputs, self._packed).numpy()

    def cache(self, name: str) -> np.ndarray:
        """Return the contents of a cache, e.g. ``"layers.0.values"``."""
        return self._tensors[[cache[0] for cache in self.caches].index(name)].numpy()

    def cpu(self, _index: int):
        """See `tvm.rpc.RPCSession.cpu`."""
        return tvm.cpu()

    def get_function(self, name: str):
        """Return the one function of a session that `check_accumulators` asks for."""
        assert name == "vm.builtin.tensor_cache.get"
        return lambda parameter: self._tensors[int(parameter.removeprefix("param_"))]

    def _tensor(self, array: np.ndarray, device):
        return tvm.runtime.tensor(array, device)
