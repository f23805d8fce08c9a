"""How a checkpoint is quantized: the choices, and which of them go together."""

from dataclasses import dataclass

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.pruning import PruningSchedule

METHODS = ("gptq", "rtn", "keep")
GROUP_SIZES = (32, 64, 128)
ACTIVATIONS = ("per-token", "per-token-group", "static", "none")
ATTENTIONS = ("float", *CODE_BOOKS)
LARGEST_REFINE = 8
"""TRIP's exponents are at most this: group scales times two to their power stay far below float16's limit."""


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized.

    Attributes
    ----------
    method : str
        How the weight codes were found: ``"gptq"``, ``"rtn"`` or ``"keep"``.
    group_size : int
        Input channels that share a weight scale: 32, 64 or 128; the last group of a row may be shorter.
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
    mixed_bits : float
        Not 0: the largest average of bits of an activation, scales included; every channel gets 4 to 7 of them
        (`agq_tvm.quantize.mixed`). For ``"per-token-group"``.
    fold : bool
        Whether powers of two were moved from norms into the weights that read them (`agq_tvm.quantize.fold`). Not
        with ``"keep"``.
    """

    method: str
    group_size: int
    symmetric: bool
    activation: str
    max_refine: int = 0
    four_bit: tuple[str, ...] = ()
    pruning: PruningSchedule | None = None
    attention: str = "float"
    mixed_bits: float = 0
    fold: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AgqError(f"unknown quantization method {self.method!r}: choose one of {', '.join(METHODS)}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise AgqError(f"group size {self.group_size!r} is not supported: choose 32, 64 or 128")
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
        if not all(isinstance(role, str) for role in self.four_bit):
            raise AgqError(f"four_bit must be names of linears, not {self.four_bit!r}")
        if self.four_bit and self.activation == "none":
            raise AgqError("float activations have no 4-bit codes: choose another activation, or leave out four_bit")
        if type(self.mixed_bits) not in (int, float) or not (self.mixed_bits == 0 or 4 < self.mixed_bits <= 8):
            raise AgqError(f"{self.mixed_bits!r} bits of activations are not a number above 4 and up to 8")
        if self.mixed_bits and (self.activation != "per-token-group" or self.four_bit):
            raise AgqError("a budget of bits is for per-token-group activations, without four_bit: leave one out")

        if type(self.fold) is not bool:
            raise AgqError(f"fold must be true or false, not {self.fold!r}")
        if self.fold and self.method == "keep":
            raise AgqError("keep leaves the model's own grid, which has no room for powers of two: choose gptq or rtn")

    @property
    def is_calibrated(self) -> bool:
        """Whether quantizing looks at what passes through the model."""
        calibrated = (self.activation == "static", self.max_refine, self.attention != "float", self.mixed_bits)
        return self.method == "gptq" or any(calibrated)

    def activation_bits(self, role: str) -> int:
        """Return the bits of the activation codes at the input of the linear of that role."""
        return 4 if role in self.four_bit else 8


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
