"""What an engine's file defines, and the operands that all of them get.

A file in `engines/` has ENVIRONMENT, the name of the virtual environment that it runs in (`environments.py`);
PACKAGE, the installed package that it needs; and one or both of

- PRODUCTS, a tuple of `Form`, and `Product`, which measures one of them;
- MODELS, a tuple of `ModelForm`, and `Model`, which runs a whole model in one of them.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

GROUP_SIZES = (32, 128)
ORIGIN = "origin.txt"
"""In the directory of a float model: the name of the 4-bit model that it is the unpacked form of."""


@dataclass(frozen=True)
class Form:
    """One way in which an engine multiplies matrices.

    Attributes
    ----------
    name : str
        Unique, as tables show it.
    kind : str
        What it is compared with: ``"g32"``, ``"g128"`` (4-bit weights, 8-bit activations), ``"int8"``, ``"float"``.
    """

    name: str
    kind: str


@dataclass(frozen=True)
class ModelForm:
    """One way in which an engine runs a model.

    Attributes
    ----------
    name : str
        Unique, as tables show it.
    bits : int
        Of the layers' weights.
    head : str
        Form of the output table, e.g. ``"Q6_K"``.
    head_bits : int
        Its bits, 4, 8, 16 or 32: which of our heads it is compared with. More than 4 and fewer than 8 count as 8.
    kept : bool
        Whether it takes the 4-bit grid that a model came with, and so only models that came with one.
    pruned : bool
        Whether tokens of the prompt are dropped.
    """

    name: str
    bits: int
    head: str
    head_bits: int
    kept: bool = False
    pruned: bool = False


class Operands:
    """Operands of y = x wᵀ, made once by the parent and read by every engine.

    Parameters
    ----------
    path : Path
        A directory.
    rows : int
        M of the product at hand, at most that of the stored `x`.
    copies : int
        Distinct copies of the weights that are gone through.
    """

    def __init__(self, path: Path | str, rows: int, copies: int):
        self.path, self.rows, self.copies = Path(path), rows, copies

    @staticmethod
    def write(path: Path, columns: int, channels: int, most_rows: int, rtn) -> None:
        """Write random operands and the float product.

        Parameters
        ----------
        path : Path
            A directory to make.
        columns, channels, most_rows : int
            N, K and the largest M.
        rtn : callable
            Rounds float32 [N, K] to symmetric 4-bit groups of a size: codes uint8 0..15 [N, K], with 8 for zero, and
            scales float32 [N, K / size].
        """
        path.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((columns, channels))
        w = rng.standard_normal((columns, channels), dtype="float32") / np.float32(channels**0.5)
        x = rng.standard_normal((most_rows, channels), dtype="float32")
        for size in GROUP_SIZES:
            codes, scales = rtn(w, size)
            np.save(path / f"codes{size}.npy", codes)
            np.save(path / f"scales{size}.npy", scales)
        np.save(path / "x.npy", x)
        np.save(path / "y.npy", x @ w.T)
        np.save(path / "w.npy", w)

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.path / f"{name}.npy", mmap_mode="r")

    @property
    def x(self) -> np.ndarray:
        """Activations, float32 [M, K]."""
        return np.array(self._load("x")[: self.rows])

    @property
    def w(self) -> np.ndarray:
        """Weights, float32 [N, K]."""
        return np.array(self._load("w"))

    def grid(self, group_size: int) -> tuple[np.ndarray, np.ndarray]:
        """4-bit weights: codes uint8 0..15 [N, K], 8 for zero, and scales float32 [N, K / group_size]."""
        return np.array(self._load(f"codes{group_size}")), np.array(self._load(f"scales{group_size}"))

    def error(self, y: np.ndarray) -> float:
        """Return the error of a result, relative to the float product: ‖y - y'‖ / ‖y'‖."""
        expected = self._load("y")[: self.rows].astype("float64")
        return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


def copy_of(array: np.ndarray, number: int) -> np.ndarray:
    """Return a copy of weights with its rows moved on.

    Engines that merge equal constants would otherwise hold one copy, and read it from a cache.
    """
    return np.roll(array, 16 * number + number, axis=0)


class Product:
    """One matrix product of an engine, float32 in and out, over distinct copies of its weights.

    Parameters
    ----------
    form : Form
    threads : int
    work : Path
        A directory of this engine's own, for what it keeps from run to run.

    Attributes
    ----------
    stored_bytes : int
        Weights with their scales in one copy, as they are stored.
    """

    stored_bytes: int

    def __init__(self, form: Form, threads: int, work: Path):
        self.form, self.threads, self.work = form, threads, work

    def prepare(self, operands: Operands) -> None:
        """Make everything that one run needs."""
        raise NotImplementedError

    def run(self) -> None:
        """Multiply once with each copy."""
        raise NotImplementedError

    def result(self) -> np.ndarray:
        """Return the last run's product with the first copy, float32 [M, N]."""
        raise NotImplementedError


class Model:
    """A model in an engine.

    Parameters
    ----------
    form : ModelForm
    threads : int
    work : Path
        A directory of this engine's own, for converted models.
    source : Path
        A Hugging Face directory, float weights.
    context : int
        Longest sequence.
    """

    def __init__(self, form: ModelForm, threads: int, work: Path, source: Path, context: int):
        raise NotImplementedError

    def prefill(self, tokens: list[int]) -> None:
        """Start anew, read a prompt and compute the logits of its last token."""
        raise NotImplementedError

    def decode(self, token: int) -> None:
        """Read one token more, and compute its logits."""
        raise NotImplementedError

    def decode_all(self, tokens: list[int]) -> None:
        """Read tokens one by one."""
        for token in tokens:
            self.decode(token)

    def last(self) -> np.ndarray:
        """Return the logits of the last token that was read, float32 [V]."""
        raise NotImplementedError

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits of every token, each read by itself: float32 [T, V]."""
        self.prefill(tokens[:1])
        found = [np.array(self.last(), "float32")]
        for token in tokens[1:]:
            self.decode(token)
            found.append(np.array(self.last(), "float32"))
        return np.array(found)


def engines() -> dict[str, ModuleType]:
    """Return every engine's module by its file's name."""
    from benchmarks.peers import engines as package

    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
