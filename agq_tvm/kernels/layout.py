"""Packed layouts of 4-bit and 8-bit weights: the one contract between packers, kernels and bundles.

A tile holds `width` output columns (V vectors of `lanes`) by 32 inner channels (one k-block). Inside it,
`depth` consecutive channels of one column stand side by side, because one multiply instruction sums them:

    4 bit   byte [step, vector, lane, i]: low nibble  = channel step * 2 * depth + i
                                          high nibble = channel step * 2 * depth + depth + i
    8 bit   byte [step, half, vector, lane, i] = channel step * 2 * depth + half * depth + i

so that both forms count channels alike, and a tile of 4-bit codes unpacks into the 8-bit order with one mask
and one shift.
"""

from dataclasses import dataclass

import numpy as np

K_BLOCK = 32
"""Inner channels of a tile; every group size is a multiple of it."""


@dataclass(frozen=True)
class Layout:
    """How the weights of one linear are stored.

    Attributes
    ----------
    bits : int
        4 or 8.
    vectors, lanes : int
        V and the columns of one vector; a tile is ``vectors * lanes`` columns wide.
    depth : int
        Channels of one column that stand side by side.
    zero : int
        What is subtracted from a code before it is stored. 4-bit codes are 0..15 (8-bit: 0..255 holding
        w + 128); ``zero`` 8 (128) stores two's complement instead, for signed multipliers.
    """

    bits: int
    vectors: int
    lanes: int
    depth: int
    zero: int

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return self.vectors * self.lanes

    @property
    def steps(self) -> int:
        """Pairs of `depth` channels in a k-block."""
        return K_BLOCK // (2 * self.depth)

    @property
    def name(self) -> str:
        """E.g. ``u4_v4x16_k4``: unsigned 4 bit, 4 vectors of 16 columns, 4 channels side by side."""
        sign = "s" if self.zero else "u"
        return f"{sign}{self.bits}_v{self.vectors}x{self.lanes}_k{self.depth}"

    def place(self, channel) -> tuple:
        """Indices (step, half, i) of a channel inside a k-block."""
        return channel // (2 * self.depth), channel // self.depth % 2, channel % self.depth

    def tiles(self, columns: int) -> int:
        """Tiles that `columns` output features take."""
        return -(-columns // self.width)

    def packed_shape(self, columns: int, channels: int) -> tuple[int, ...]:
        """Shape of the packed weights, uint8, for [columns, channels]."""
        blocks = -(-channels // K_BLOCK)
        halves = () if self.bits == 4 else (2,)
        return (self.tiles(columns), blocks, self.steps, *halves, self.vectors, self.lanes, self.depth)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """Pack codes into tiles.

        Parameters
        ----------
        codes : uint8 [N, K]
            0..15, or 0..255 for 8 bit.

        Returns
        -------
        packed : uint8, `packed_shape(N, K)`
            Columns and channels beyond N and K hold a stored zero.
        """
        columns, channels = codes.shape
        tiles, blocks = self.tiles(columns), -(-channels // K_BLOCK)
        full = np.full((tiles * self.width, blocks * K_BLOCK), self.zero, "uint8")
        full[:columns, :channels] = codes
        stored = full - np.uint8(self.zero)  # wraps around: two's complement
        tiled = stored.reshape(tiles, self.vectors, self.lanes, blocks, self.steps, 2, self.depth)
        tiled = tiled.transpose(0, 3, 4, 5, 1, 2, 6)  # tile, block, step, half, vector, lane, i
        if self.bits == 8:
            return np.ascontiguousarray(tiled)
        low, high = tiled[:, :, :, 0], tiled[:, :, :, 1]
        return np.ascontiguousarray((low & 15) | (high << 4))

    def unpack(self, packed: np.ndarray, columns: int, channels: int) -> np.ndarray:
        """Return the codes, uint8 [columns, channels], of weights that `pack` made."""
        if self.bits == 4:
            packed = np.stack([packed & 15, packed >> 4], axis=3)
        tiles, blocks = packed.shape[:2]
        codes = packed.transpose(0, 4, 5, 1, 2, 3, 6).reshape(tiles * self.width, blocks * K_BLOCK)
        codes = codes + np.uint8(self.zero)
        return (codes & 15 if self.bits == 4 else codes)[:columns, :channels]

    def pack_columns(self, values: np.ndarray) -> np.ndarray:
        """Tile values that stand once per column and group: [N, G] to [tiles, G, vectors, lanes]."""
        columns, groups = values.shape
        full = np.zeros((self.tiles(columns) * self.width, groups), values.dtype)
        full[:columns] = values
        tiled = full.reshape(-1, self.vectors, self.lanes, groups)
        return np.ascontiguousarray(tiled.transpose(0, 3, 1, 2))


def k_blocks(channels: int, group_size: int) -> int:
    """K-blocks of the padded inner dimension: whole groups of whole k-blocks, a short last group filled up."""
    return -(-channels // group_size) * -(-group_size // K_BLOCK)
