"""How a checkpoint is quantized: the choices, and which of them go together."""

from collections.abc import Iterable
from dataclasses import dataclass

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.pruning import PruningSchedule

METHODS = ("gptq", "rtn", "keep")
GROUP_SIZES = (32, 64, 128)
COLUMN = "column"
"""The group size of one weight scale for each output column."""
ACTIVATIONS = ("per-token", "per-token-group", "static", "none")
ATTENTIONS = ("float", *CODE_BOOKS)
WEIGHT_BITS = (4, 8)
HEAD_BITS = (4, 8, 16)
LARGEST_REFINE = 8
"""TRIP's exponents are at most this: group scales times two to their power stay far below float16's limit."""


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized.

    Attributes
    ----------
    method : str
        How the weight codes were found: ``"gptq"``, ``"rtn"`` or ``"keep"``.
    group_size : int or str
        Input channels that share a weight scale: 32, 64 or 128, where the last group of a row may be shorter, or
        ``"column"`` for all of them.
    symmetric : bool
        Whether every offset is -8 times its scale (offsets are then not stored).
    activation : str
        ``"per-token"``, ``"per-token-group"``, ``"static"`` or ``"none"`` (float activations).
    max_refine : int
        TRIP's largest exponent, K in the paper: a group of input channels is divided by 2^alpha, alpha in
        0..max_refine, before its activations are rounded. 0 for none. Not with scales of groups.
    four_bit : tuple of str
        The linears, by role, whose inputs have 4-bit codes, -7..7.
    pruning : PruningSchedule or None
        Which tokens of a prompt are dropped on their way through the layers.
    attention : str
        ``"float"``, or a name in `CODE_BOOKS`: probabilities are powers of two then, and values int8.
    shifts : bool
        TRIP in the paper's integer-only form: exponents of channels, not of groups, by which the accumulator is
        shifted (see `agq_tvm.quantize.shifts`). With scales of columns, static activations and `max_refine`.
    weight_bits : int
        Of the linears' weight codes, 4 or 8; codes of 8 bits are symmetric and rounded to nearest.
    mixed_bits : float
        Not 0: the largest average of bits of an activation, scales included; every channel gets 4 to 7 of them
        (`agq_tvm.quantize.mixed`). For ``"per-token-group"``.
    fold : bool
        Whether powers of two were moved from norms into the weights that read them (`agq_tvm.quantize.fold`). Not
        with ``"keep"``.
    head_bits : int
        Of the matrices outside the layers: 4, 8, or 16 for float16.
    integer_grid : bool
        Whether scales and offsets of a column's groups are whole multiples of one unit
        (`agq_tvm.quantize.integer_grid`). With ``"per-token"`` or ``"static"`` activations, not with ``"keep"``.
    """

    method: str
    group_size: int | str
    symmetric: bool
    activation: str
    max_refine: int = 0
    four_bit: tuple[str, ...] = ()
    pruning: PruningSchedule | None = None
    attention: str = "float"
    shifts: bool = False
    weight_bits: int = 4
    mixed_bits: float = 0
    fold: bool = False
    head_bits: int = 8
    integer_grid: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AgqError(f"unknown quantization method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.group_size != COLUMN and (type(self.group_size) is not int or self.group_size not in GROUP_SIZES):
            raise AgqError(f"group size {self.group_size!r} is not supported: choose 32, 64, 128 or {COLUMN}")
        if type(self.symmetric) is not bool:
            raise AgqError(f"symmetric must be true or false, not {self.symmetric!r}")
        if self.activation not in ACTIVATIONS:
            raise AgqError(f"unknown activation {self.activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if self.attention not in ATTENTIONS:
            raise AgqError(f"unknown attention {self.attention!r}: choose one of {', '.join(ATTENTIONS)}")
        if type(self.max_refine) is not int or not 0 <= self.max_refine <= LARGEST_REFINE:
            raise AgqError(f"max_refine {self.max_refine!r} is not an integer in 0..{LARGEST_REFINE}")
        if self.max_refine and self.activation not in ("static", "per-token"):
            raise AgqError(f"max_refine is for static and per-token activations: {self.activation} ones need none")
        self._check_shifts()
        if not all(isinstance(role, str) for role in self.four_bit):
            raise AgqError(f"four_bit must be names of linears, not {self.four_bit!r}")
        if self.four_bit and self.activation == "none":
            raise AgqError("float activations have no 4-bit codes: choose another activation, or leave out four_bit")
        if type(self.weight_bits) is not int or self.weight_bits not in WEIGHT_BITS:
            raise AgqError(f"weight_bits {self.weight_bits!r} is not supported: choose 4 or 8")
        if self.weight_bits == 8 and not (self.method == "rtn" and self.symmetric):
            raise AgqError("8-bit weights are symmetric and rounded to nearest: choose the method rtn")
        if type(self.head_bits) is not int or self.head_bits not in HEAD_BITS:
            raise AgqError(f"head_bits {self.head_bits!r} is not supported: choose 4, 8 or 16")
        self._check_mixed()
        if type(self.fold) is not bool:
            raise AgqError(f"fold must be true or false, not {self.fold!r}")
        if self.fold and self.method == "keep":
            raise AgqError("keep leaves the model's own grid, which has no room for powers of two: choose gptq or rtn")
        self._check_integer_grid()

    def _check_mixed(self) -> None:
        if type(self.mixed_bits) not in (int, float) or not (self.mixed_bits == 0 or 4 < self.mixed_bits <= 8):
            raise AgqError(f"{self.mixed_bits!r} bits of activations are not a number above 4 and up to 8")
        if self.mixed_bits and self.integer_grid is True:
            raise AgqError("a budget of bits and an integer grid do not go together: leave one out")
        if self.mixed_bits and (self.activation != "per-token-group" or self.four_bit or self.group_size == COLUMN):
            raise AgqError(
                "a budget of bits is for per-token-group activations and groups of 32, 64 or 128, without four_bit: "
                "leave one out"
            )

    def _check_integer_grid(self) -> None:
        if type(self.integer_grid) is not bool:
            raise AgqError(f"integer_grid must be true or false, not {self.integer_grid!r}")
        if not self.integer_grid:
            return
        if self.method == "keep":
            raise AgqError("keep leaves the model's own grid, which is not one of integers: choose gptq or rtn")
        if self.group_size == COLUMN or self.symmetric or self.weight_bits == 8:
            raise AgqError("an integer grid is for 4-bit weights in groups of 32, 64 or 128 with offsets: choose these")
        if self.activation not in ("per-token", "static") or self.max_refine:
            raise AgqError(
                "an integer grid takes sums over whole rows: choose per-token or static activations, without max_refine"
            )

    def _check_shifts(self) -> None:
        if type(self.shifts) is not bool:
            raise AgqError(f"shifts must be true or false, not {self.shifts!r}")
        if self.shifts and not (self.group_size == COLUMN and self.activation == "static" and self.max_refine):
            raise AgqError(
                f"shifts need group size {COLUMN}, static activations and max_refine of 1 or more: set all three"
            )
        if self.shifts and self.weight_bits == 8:
            raise AgqError("8-bit weights have no kernels that shift: leave out shifts, or choose 4 bits")
        if self.max_refine and self.group_size == COLUMN and not self.shifts:
            raise AgqError(
                f"max_refine needs groups of 32, 64 or 128: choose one of these, or group size {COLUMN} with shifts"
            )

    def group_of(self, in_features: int) -> int:
        """Return how many input channels of a matrix share a scale."""
        return in_features if self.group_size == COLUMN else self.group_size

    @property
    def weight_scales(self) -> str:
        """Say in words what shares a weight scale."""
        return "a scale for each column" if self.group_size == COLUMN else f"groups of {self.group_size}"

    @property
    def is_calibrated(self) -> bool:
        """Whether quantizing looks at what passes through the model."""
        calibrated = (
            self.activation == "static",
            self.max_refine,
            self.attention != "float",
            self.mixed_bits,
            self.head_bits == 4,
        )
        return self.method == "gptq" or any(calibrated)

    def activation_bits(self, role: str) -> int:
        """Return the bits of the activation codes at the input of the linear of that role."""
        return 4 if role in self.four_bit else 8


def roles_of(config: DecoderConfig, roles: Iterable[str]) -> tuple[str, ...]:
    """Name linears as a model has them: what reads the second norm is ``gate_up`` with a gate, and ``up`` without."""
    inner = config.linears[2].name
    return tuple(inner if role in ("gate_up", "up") else role for role in roles)


def check_roles(config: DecoderConfig, roles: tuple[str, ...]) -> None:
    """Check that a model has linears of these roles.

    Raises
    ------
    AgqError
        Naming one that it has not.
    """
    known = [linear.name for linear in config.linears]
    for role in roles:
        if role not in known:
            raise AgqError(f"the model has no linear {role!r}: choose from {', '.join(known)}")
