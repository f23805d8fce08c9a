"""A bundle's functions on a board, through TVM's RPC: parameters stay there, tokens go and logits come."""

import json
import tempfile
from pathlib import Path

import numpy as np

from agq_tvm.boards.tracker import board_features
from agq_tvm.runtime.bundle import LIBRARY, PARAMETERS, Bundle
from agq_tvm.runtime.threads import configure_board

_CPU = 1  # DLPack's device type
_PREFIX = "param"


class BoardSession:
    """See `agq_tvm.runtime.engine.Session`.

    Parameters
    ----------
    bundle : Bundle
    session : tvm.rpc.RPCSession
        From `agq_tvm.boards.tracker.connect`; it stays open as long as this object lives.

    Raises
    ------
    AgqError
        If the bundle is damaged, or the board's processor lacks what it needs (TVM's own Python server cannot tell).
    """

    def __init__(self, bundle: Bundle, session):
        import tvm
        from tvm import relax

        self._rpc, self._device, self._tensor = session, session.cpu(0), tvm.runtime.tensor
        self._call = session.get_function
        bundle.arrays()  # checks what is about to be sent
        features = board_features(session)
        if features is not None:
            bundle.check_runs_on("aarch64" if "asimd" in features else "x86_64", features)
        configure_board(session.get_function, bundle.manifest["device"]["threads"])
        session.upload(str(bundle.path / LIBRARY))
        self.library = session.load_module(LIBRARY)
        self._machine = relax.VirtualMachine(self.library, self._device)
        self._packed = self._load(bundle)

    def _load(self, bundle: Bundle):
        """Put caches and parameters into the board's own tensor cache and return them as one handle."""
        first = len(bundle.caches)
        records = [
            {
                "name": f"{_PREFIX}_{first + i}",
                "shape": list(p.shape),
                "dtype": p.dtype,
                "format": "raw",
                "nbytes": p.nbytes,
                "byteOffset": p.offset,
            }
            for i, p in enumerate(bundle.parameters)
        ]
        shard = {
            "dataPath": PARAMETERS,
            "format": "raw-shard",
            "nbytes": (bundle.path / PARAMETERS).stat().st_size,
            "records": records,
        }
        with tempfile.TemporaryDirectory() as scratch:
            index = Path(scratch) / "tensor-cache.json"
            index.write_text(json.dumps({"metadata": {}, "records": [shard]}))
            self._rpc.upload(str(index))
        self._rpc.upload(str(bundle.path / PARAMETERS))
        self._call("vm.builtin.tensor_cache.clear")()
        self._call("vm.builtin.tensor_cache.load")(self._call("tvm.rpc.server.workpath")(""), _CPU, 0)
        update = self._call("vm.builtin.tensor_cache.update")
        for i, (_, shape, dtype) in enumerate(bundle.caches):
            update(f"{_PREFIX}_{i}", self._tensor(np.zeros(shape, dtype), self._device), True)
        count = first + len(bundle.parameters)
        return self._call("vm.builtin.param_array_from_cache")(_PREFIX, count)

    def run(self, function: str, tokens: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See `Session.run`."""
        inputs = [self._tensor(array, self._device) for array in (tokens, positions, lengths)]
        return self._machine[function](*inputs, self._packed).numpy()
