"""A profile: what the operations of a decoder take on a device, and which inputs should have 4 bits there.

It is written as JSON, and nothing in such a file is trusted when it is read.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json, write_json

FORMAT_VERSION = 2
PROFILE = "profile.json"
KINDS = ("linear", "attention", "nonlinear", "quantization")
SECTIONS = ("embedding", "block", "head")
"""Parts of a decoder, in order."""
_MOST_ROWS = 4096


@dataclass(frozen=True)
class OperationTimes:
    """What one operation takes.

    Attributes
    ----------
    name : str
        A linear's is its role.
    section : str
        One of `SECTIONS`.
    kind : str
        One of `KINDS`.
    seconds, spread : dict of str to float
        By form, for one call of the decoder, all its blocks together: the median of some repeats and half the distance
        between their quartiles. A form lacks what it does not do; an emulated board has no forms at all.
    """

    name: str
    section: str
    kind: str
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoleProposal:
    """What 4 bits at the inputs of one role bring.

    Attributes
    ----------
    saved_percent : float
        Of the decoder's time in W4A8, mean over the numbers of rows; 0 where it is within the spread.
    cost_percent : float or None
        Perplexity that it costs alone, mean and two standard errors; None where it was not measured.
    chosen : bool
    """

    saved_percent: float
    cost_percent: float | None
    chosen: bool


@dataclass(frozen=True)
class Proposal:
    """Which inputs should have 4 bits.

    Attributes
    ----------
    budget_percent : float
        Perplexity that they may cost together.
    four_bit : tuple of str
        Roles of linears.
    cost_percent : float or None
        What they cost together, mean and two standard errors.
    reason : str
        One sentence.
    roles : dict of str to RoleProposal
    """

    budget_percent: float
    four_bit: tuple[str, ...]
    cost_percent: float | None
    reason: str
    roles: dict[str, RoleProposal]


@dataclass(frozen=True)
class Profile:
    """See the attributes.

    Attributes
    ----------
    device, instruction_set : str
    threads : int
    board : str or None
        Key of the board, None for this machine.
    emulated : bool
        Whether time means nothing there.
    load : float or None
        Of this machine when timing began: how many programs wanted a processor, mean of the last minute.
    family : str
        Of the model.
    layers : int
        Its blocks.
    activation : str
        How the checkpoint's activations are quantized; ``"none"`` for floats.
    group_size : int or str
        ``"column"`` for one scale of a column.
    head_bits : int
        Of the weights outside the blocks, in forms of integers.
    cache : str
        What keys and values are stored as in forms of integers.
    positions : int
        Keys that attention sees at the last row.
    forms : tuple of str
    own : str
        Which of them `agq compile` makes of the checkpoint.
    operations : dict of int to tuple of OperationTimes
        By rows.
    proposal : Proposal
    """

    device: str
    instruction_set: str
    threads: int
    board: str | None
    emulated: bool
    load: float | None
    family: str
    layers: int
    activation: str
    group_size: int | str
    head_bits: int
    cache: str
    positions: int
    forms: tuple[str, ...]
    own: str
    operations: dict[int, tuple[OperationTimes, ...]]
    proposal: Proposal

    def as_dict(self) -> dict:
        """Return what is written as JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self), "weight_stream": self.weight_stream()}

    def weight_stream(self) -> dict[str, dict[str, float]]:
        """Return, by form, which share of a decode step the products with weights take: they do little but read them.

        ``"model"`` is the share of all products, the head's too, in the whole decoder; ``"block"`` that of a block's
        in the block. Empty without times of one row.
        """
        decode = () if self.emulated else self.operations.get(1, ())
        block = tuple(operation for operation in decode if operation.section == "block")
        parts = {"model": decode, "block": block} if decode else {}
        shares = {form: {} for form in self.forms if parts}
        for form, share in shares.items():
            share.update({part: total(each, form, "linear") / total(each, form) for part, each in parts.items()})
        return shares


def total(
    operations: Iterable[OperationTimes], form: str, kind: str | None = None, section: str | None = None
) -> float:
    """Return the seconds of operations in a form, of one kind or section or of all."""
    return sum(
        each.seconds.get(form, 0.0)
        for each in operations
        if kind in (None, each.kind) and section in (None, each.section)
    )


def roles_in(operations: Iterable[OperationTimes]) -> list[str]:
    """Return the roles of a block's linears."""
    return [each.name for each in operations if each.kind == "linear" and each.section == "block"]


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile as JSON."""
    write_json(path, profile.as_dict())


def read_profile(path: str | os.PathLike) -> Profile:
    """Read a profile.

    Parameters
    ----------
    path : path-like
        The file, or the directory that holds it as ``profile.json``.

    Raises
    ------
    AgqError
        If there is none, or it is not as it should be.
    """
    path = Path(path)
    if not path.exists():
        raise AgqError(f"there is no profile {path}: give the directory that agq profile wrote")
    path = path / PROFILE if path.is_dir() else path
    return _Reader(path).profile(read_json(path, "profile"))


class _Reader:
    """Turns the values of a file into a `Profile`, or says which is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, where: str, what: str) -> AgqError:
        return AgqError(f"{self.path}: {where} {what}: the profile is damaged, make it again with `agq profile`")

    def profile(self, values: dict) -> Profile:
        version = values.pop("format_version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise AgqError(f"{self.path} is not a profile of format {FORMAT_VERSION}: make it with `agq profile`")
        stream = values.pop("weight_stream", None)
        self.keys("the file", values, Profile)
        emulated = self.flag(values, "emulated")
        forms = self.texts(values, "forms")
        profile = Profile(
            device=self.text(values, "device"),
            instruction_set=self.text(values, "instruction_set"),
            threads=self.integer(values, "threads", 1, 1 << 16),
            board=None if values["board"] is None else self.text(values, "board"),
            emulated=emulated,
            load=None if values["load"] is None else self.number("load", values["load"]),
            family=self.text(values, "family"),
            layers=self.integer(values, "layers", 1, 1 << 16),
            activation=self.text(values, "activation"),
            group_size=self.group_size(values),
            head_bits=self.integer(values, "head_bits", 1, 32),
            cache=self.text(values, "cache"),
            positions=self.integer(values, "positions", 1, 1 << 24),
            forms=forms,
            own=self.checked("own", values["own"], lambda v: v in forms, "one of its forms"),
            operations=self.operations(values["operations"], () if emulated else forms),
            proposal=self.proposal(values["proposal"]),
        )
        if stream != profile.weight_stream():
            raise self.error("weight_stream", "is not what its times say")
        roles = {role for operations in profile.operations.values() for role in roles_in(operations)}
        unknown = sorted({*profile.proposal.four_bit, *profile.proposal.roles} - roles)
        if unknown:
            raise self.error("proposal", f"names {unknown[0]!r}, which is no linear of its blocks")
        if emulated and profile.proposal.four_bit:
            raise self.error("proposal.four_bit", "is not empty, but the board was emulated")
        return profile

    def group_size(self, values: Mapping) -> int | str:
        is_column = values["group_size"] == "column"
        return "column" if is_column else self.integer(values, "group_size", 1, 1 << 20)

    def operations(self, values: object, forms: tuple[str, ...]) -> dict[int, tuple[OperationTimes, ...]]:
        read = {}
        for rows, operations in self.table("operations", values).items():
            if not (rows.isascii() and rows.isdigit() and 1 <= int(rows) <= _MOST_ROWS):
                raise self.error("operations", f"has {rows!r}, which is no number of rows")
            where = f"operations.{rows}"
            if not isinstance(operations, list) or not operations:
                raise self.error(where, "is not a list of operations")
            read[int(rows)] = tuple(self.operation(where, value, forms) for value in operations)
            for form in forms:
                if not total(read[int(rows)], form, "linear", "block"):
                    raise self.error(where, f"has no time for the linears of a block in {form}")
        if not read:
            raise self.error("operations", "is empty")
        return read

    def operation(self, where: str, values: object, forms: tuple[str, ...]) -> OperationTimes:
        self.keys(where, values, OperationTimes)
        kind, section = self.text(values, "kind"), self.text(values, "section")
        if kind not in KINDS:
            raise self.error(f"{where}: kind", f"cannot be {kind!r}")
        if section not in SECTIONS:
            raise self.error(f"{where}: section", f"cannot be {section!r}")
        seconds, spread = (self.numbers(f"{where}.{name}", values[name]) for name in ("seconds", "spread"))
        wanted = set(forms) if kind == "linear" else set(seconds) & set(forms)
        if seconds.keys() != wanted or spread.keys() != wanted:
            raise self.error(where, f"has not a time for each of {', '.join(forms) or 'no forms'}")
        return OperationTimes(self.text(values, "name"), section, kind, seconds, spread)

    def proposal(self, values: object) -> Proposal:
        self.keys("proposal", values, Proposal)
        roles = {}
        for name, role in self.table("proposal.roles", values["roles"]).items():
            self.keys(f"proposal.roles.{name}", role, RoleProposal)
            saved = self.number(f"proposal.roles.{name}.saved_percent", role["saved_percent"])
            roles[name] = RoleProposal(saved, self.cost(role), self.flag(role, "chosen"))
        four_bit = self.texts(values, "four_bit")
        if sorted(four_bit) != sorted(name for name, role in roles.items() if role.chosen):
            raise self.error("proposal.four_bit", "is not what its roles say was chosen")
        budget = self.number("proposal.budget_percent", values["budget_percent"])
        return Proposal(budget, four_bit, self.cost(values), self.text(values, "reason"), roles)

    def cost(self, values: Mapping) -> float | None:
        value = values["cost_percent"]
        return None if value is None else self.number("cost_percent", value)

    def table(self, where: str, value: object) -> dict:
        if not isinstance(value, dict):
            raise self.error(where, "is not a table")
        return value

    def keys(self, where: str, values: object, form: type) -> None:
        names = {one.name for one in fields(form)}
        if self.table(where, values).keys() != names:
            wrong = sorted(names ^ values.keys())[0]
            raise self.error(where, f"{'lacks' if wrong in names else 'has an unknown key'} {wrong!r}")

    def text(self, values: Mapping, key: str) -> str:
        return self.checked(key, values[key], lambda v: isinstance(v, str) and 0 < len(v) <= 1000, "a text")

    def texts(self, values: Mapping, key: str) -> tuple[str, ...]:
        def is_list(value) -> bool:
            return isinstance(value, list) and all(isinstance(v, str) for v in value) and len(set(value)) == len(value)

        return tuple(self.checked(key, values[key], is_list, "a list of different texts"))

    def flag(self, values: Mapping, key: str) -> bool:
        return self.checked(key, values[key], lambda v: type(v) is bool, "true or false")

    def integer(self, values: Mapping, key: str, low: int, high: int) -> int:
        what = f"an integer in {low}..{high}"
        return self.checked(key, values[key], lambda v: type(v) is int and low <= v <= high, what)

    def numbers(self, where: str, value: object) -> dict[str, float]:
        return {name: self.number(f"{where}.{name}", one) for name, one in self.table(where, value).items()}

    def number(self, where: str, value: object) -> float:
        def is_number(v) -> bool:
            return type(v) in (int, float) and math.isfinite(v) and v >= 0

        return float(self.checked(where, value, is_number, "a number of 0 or more"))

    def checked(self, where: str, value, test: Callable[[object], bool], what: str):
        if not test(value):
            raise self.error(where, f"is not {what}, but {value!r:.40}")
        return value
