"""A bundle's own kernels on a board, asked for what no float can hide: the integer sums of every group."""

import gc
from importlib import resources
from pathlib import Path

import numpy as np

from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.kernels.linear import ZERO, LinearKernel
from agq_tvm.kernels.linear_grid import GridKernel, choose
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.models.decoder import PREFILL_BUCKETS
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.shifts import channel_order
from agq_tvm.runtime.agreement import Agreement, agreement
from agq_tvm.runtime.board_session import BoardSession
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine


def compile_with(instruction_set: str, checkpoint: Path, folder: Path) -> Bundle:
    """Compile a checkpoint for a Raspberry Pi 4 whose device file names another instruction set."""
    device = resources.files("agq_tvm.targets").joinpath("devices", "raspberry-pi-4.toml").read_text()
    assert 'instruction_set = "neon"' in device
    (folder / "device.toml").write_text(device.replace('"neon"', f'"{instruction_set}"'))
    compile_checkpoint(checkpoint, folder / "device.toml", folder / "b", context=64)
    return Bundle(folder / "b")


def check_bundle(session, bundle: Bundle, checkpoint: Checkpoint, tokens: list[int], steps: int) -> Agreement:
    """Run a bundle on a board; return how its free-running logits agree with the reference.

    Raises AssertionError where an integer accumulator differs.

    Parameters
    ----------
    tokens : list of int
        Prefilled in chunks, but for the last `steps`, which are decoded one by one.
    """
    board = BoardSession(bundle, session)
    reference = ReferenceModel.from_checkpoint(checkpoint)
    check_accumulators(board, session, bundle, checkpoint, reference, tokens)
    engine = Engine(bundle, board)
    rows = [engine.prefill(tokens[:-steps], all_logits=True)]
    rows += [engine.decode(token)[None] for token in tokens[-steps:]]
    result = agreement(reference.logits(tokens), np.concatenate(rows))
    del engine, board
    gc.collect()
    return result


def check_accumulators(board, session, bundle, checkpoint, reference, tokens) -> None:
    """Compare every group's dot products, of every linear, on the reference's own codes.

    The kernels return floats; with scale 1 for one group and 0 for the others that float is the group's integer,
    exactly, since it is below 2^24.
    """
    traced = []
    reference.logits(tokens, trace=lambda *values: traced.append(values))
    probe = _Probe(board, session, bundle, checkpoint)
    assert len(traced) == len(checkpoint.config.linears) * checkpoint.config.num_layers
    for name, codes, _, sums in traced:
        for rows in (1, PREFILL_BUCKETS[0]):
            got = probe.accumulators(name, codes[:rows])
            np.testing.assert_array_equal(got, sums[:rows], err_msg=f"{name}, {rows} rows")


class _Probe:
    """Calls the linears of a loaded bundle with operands of our own."""

    def __init__(self, board: BoardSession, session, bundle: Bundle, checkpoint: Checkpoint):
        self.library, self.session, self.checkpoint = board.library, session, checkpoint
        self.isa = instruction_set(bundle.manifest["device"]["instruction_set"])
        names = [name for name, _, _ in bundle.caches] + [p.name for p in bundle.parameters]
        self.index = {name: i for i, name in enumerate(names)}
        dtypes = {p.name: p.dtype for p in bundle.parameters}
        self.offsets = dtypes.get("layers.0.qkv.wo")
        self.tensor = board._tensor
        self.device = session.cpu(0)

    def on_board(self, array: np.ndarray):
        return self.tensor(np.ascontiguousarray(array), self.device)

    def accumulators(self, name: str, codes: np.ndarray) -> np.ndarray:
        """Return int32 [M, G, N] for int8 codes [M, K]."""
        config, scheme = self.checkpoint.config, self.checkpoint.scheme
        linear = next(linear for linear in config.linears if name.endswith(f".{linear.name}"))
        if scheme.shifts:
            return self._totals(name, linear, codes)
        if scheme.integer_grid and self.isa.grids:
            return self._grid_sums(name, linear, codes)
        group_size = -(-scheme.group_of(linear.in_features) // K_BLOCK) * K_BLOCK
        kernel = LinearKernel(
            len(codes),
            sum(linear.rows),
            linear.in_features,
            scheme.weight_bits,
            group_size,
            scheme.activation == "per-token-group",
            self.offsets,
            scheme.activation == "static" or linear.bias,
            scheme.activation_bits(linear.name),
        )
        layout = self.isa.layout(kernel.bits)
        M, G, tiles = len(codes), kernel.groups, layout.tiles(kernel.columns)
        padded = np.zeros((M, G * group_size), "int8")
        padded[:, : codes.shape[1]] = codes
        x = self._blocked(padded)
        per_column = (tiles, G, layout.vectors, layout.lanes)
        scales = [self.on_board(np.ones((M, G if kernel.per_group else 1), "float32"))]
        weights = self._parameter(f"{name}.w")
        code_sums = padded.reshape(M, G, -1).sum(-1, dtype="int32")
        operands = [x, *scales, self.on_board(code_sums), weights]
        rest = []
        if self.offsets:
            rest.append(self.on_board(np.zeros(per_column, self.offsets)))
        if kernel.bias:
            rest.append(self.on_board(np.zeros((tiles, layout.vectors, layout.lanes), "float32")))
        out = self.on_board(np.zeros((M, tiles * layout.width), "float32"))
        function = self.library.get_function(kernel.name, True)
        sums = np.empty((M, G, kernel.columns), "int32")
        for group in range(G):
            one = np.zeros(per_column, "float16")
            one[:, group] = 1
            function(*operands, self.on_board(one), *rest, out)
            sums[:, group] = out.numpy()[:, : kernel.columns]
        # Without offsets the kernel counts weights from the code that stands for 0; so do 8-bit ones of checkpoints.
        return sums if self.offsets or kernel.bits == 8 else sums + ZERO[4] * code_sums[..., None]

    def _parameter(self, name: str):
        """Return a packed parameter of the bundle as it is on the board."""
        return self.session.get_function("vm.builtin.tensor_cache.get")(f"param_{self.index[name]}")

    def _blocked(self, codes: np.ndarray):
        """Put padded codes [M, K] on the board by k-block, then row."""
        layout = self.isa.layout_4bit
        x = codes.reshape(len(codes), -1, layout.steps, 2, layout.depth).transpose(1, 0, 2, 3, 4)
        assert x.shape[0] * K_BLOCK == codes.shape[1]
        return self.on_board(x)

    def _grid_sums(self, name: str, linear, codes: np.ndarray) -> np.ndarray:
        """Return the sums of groups, int32 [M, G, N]: totals where one group has steps of 1, and all else is 0."""
        scheme, layout, M = self.checkpoint.scheme, self.isa.layout_4bit, len(codes)
        bias = scheme.activation == "static" or linear.bias
        sizes = (M, sum(linear.rows), linear.in_features, scheme.group_size)
        kernel = choose(self.isa, *sizes, bias, scheme.activation_bits(linear.name))
        tiles, tile = layout.tiles(kernel.columns), (layout.vectors, layout.lanes)
        x = np.zeros((M, kernel.groups * kernel.group_size), "int8")
        x[:, : codes.shape[1]] = codes
        summed = x.reshape(M, 1 if isinstance(kernel, GridKernel) else kernel.groups, -1)
        operands = [
            self._blocked(x),
            self.on_board(np.ones((M, 1), "float32")),
            self.on_board(summed.sum(2, dtype="int32")),
            self._parameter(f"{name}.w"),
        ]
        zeros = self.on_board(np.full((tiles, kernel.groups, *tile), 128, "uint8"))
        rest = [self.on_board(np.ones((tiles, 1, *tile), "float16"))]
        rest += [self.on_board(np.zeros((tiles, *tile), "float32"))] if kernel.bias else []
        out = self.on_board(np.zeros((M, tiles * layout.width), "float32"))
        sums = np.empty((M, kernel.groups, kernel.columns), "int32")
        for group in range(kernel.groups):
            steps = np.zeros((tiles, kernel.groups, *tile), "uint8")
            steps[:, group] = 1
            self.library.get_function(kernel.name, True)(*operands, self.on_board(steps), zeros, *rest, out)
            sums[:, group] = out.numpy()[:, : kernel.columns]
        return sums

    def _totals(self, name: str, linear, codes: np.ndarray) -> np.ndarray:
        """Return the shifted accumulators, int32 [M, 1, N]: the result for scales of 1, below 2^24."""
        layer, layout = int(name.split(".")[1]), self.isa.layout_4bit
        alpha = self.checkpoint.fused(layer, linear.parts)[0].alpha
        kernel = ShiftedKernel(
            len(codes),
            sum(linear.rows),
            linear.in_features,
            self.offsets,
            self.checkpoint.scheme.activation_bits(linear.name),
        )
        M, tiles = len(codes), layout.tiles(kernel.columns)
        x = np.zeros((M, kernel.blocks * K_BLOCK), "int8")
        x[:, : codes.shape[1]] = codes[:, channel_order(alpha)]
        sums = (codes * np.exp2(alpha, dtype="float64")).sum(1, keepdims=True).astype("int32")
        ones = np.ones((tiles, 1, layout.vectors, layout.lanes), "float16")
        out = self.on_board(np.zeros((M, tiles * layout.width), "float32"))
        self.library.get_function(kernel.name, True)(
            self._blocked(x),
            self.on_board(np.ones((M, 1), "float32")),
            self.on_board(sums),
            self._parameter(f"{name}.w"),
            self._parameter(f"{name}.shift"),
            self.on_board(ones),
            *([self.on_board(np.zeros(ones.shape, self.offsets))] if self.offsets else []),
            self.on_board(np.zeros((tiles, layout.vectors, layout.lanes), "float32")),
            out,
        )
        totals = out.numpy()[:, : kernel.columns].astype("int32")
        return (totals if self.offsets else totals + ZERO[4] * sums)[:, None]
