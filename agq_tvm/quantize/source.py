"""Models to quantize: a Hugging Face directory or hub id, a GGUF file, or a name that we know."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 by this import, and safetensors needs it)
import numpy as np
from safetensors import SafetensorError, safe_open

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json, write_json
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.models.registry import describe
from agq_tvm.quantize.checkpoint import QuantizedLinear, quantization_config
from agq_tvm.quantize.known import KNOWN, fetch_known
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.quantize.tensor_names import bias_shapes, linear_shapes, table_shapes, vector_shapes
from agq_tvm.quantize.weights import checked, rtn, rtn_8bit

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FLOATS = ("F32", "F16", "BF16")
_WANTED = ("*.json", "*.jinja", "*.safetensors")
_UNWANTED = ("*/*", "consolidated*")


class Source:
    """A model with float weights, read tensor by tensor.

    Attributes
    ----------
    label : str
        Where it came from, for messages.
    config : DecoderConfig
    raw_config : dict
        A Hugging Face ``config.json``.
    """

    def __init__(self, label: str, raw_config: dict) -> None:
        self.label = label
        self.raw_config = raw_config
        try:
            self.config: DecoderConfig = describe(raw_config)
        except AgqError as error:
            raise AgqError(f"{label}: {error}") from error
        self._biases = bias_shapes(self.config)

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor by its Hugging Face name, e.g. ``"model.norm.weight"``, as finite float32.

        Rows that a model stores by head come in the order in which they are used, see `Linear.row_order`.
        """
        return checked(self._tensor(name), name)

    def bias(self, name: str) -> np.ndarray | None:
        """Read the bias of the module `name`, float32 [N], or return None if it has none."""
        return self.tensor(f"{name}.bias") if f"{name}.bias" in self._biases else None

    def kept_linear(self, name: str) -> QuantizedLinear | None:
        """Return the 4-bit grid that the module `name` already has, exactly, or None if it has none."""
        return None

    def kept_table(self, name: str, bits: int) -> QuantizedLinear | None:
        """Return the grid of so many bits that the table `name` already has, exactly, or None if it has none."""
        return None

    @property
    def is_four_bit(self) -> bool:
        """Whether every linear already has a 4-bit grid in groups of 32."""
        return False

    @property
    def is_symmetric(self) -> bool:
        """Whether the offset of every group of that grid is -8 scales."""
        return False

    def copy_tokenizer(self, directory: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, the chat template inside it."""
        raise NotImplementedError

    def _tensor(self, name: str) -> np.ndarray:
        raise NotImplementedError


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name every tensor that a float model must have, with its shape."""
    matrices = {**table_shapes(config), **linear_shapes(config)}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in matrices.items()}
    return shapes | bias_shapes(config) | vector_shapes(config)


def check_shapes(label: str, config: DecoderConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors found with those that the config asks for.

    Raises
    ------
    AgqError
        If one is missing, unexpected (a bias would silently be lost) or has another shape.
    """
    expected = tensor_shapes(config)
    unused = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        unused.add(f"{config.head}.weight")
    extra = sorted(found.keys() - expected.keys() - unused)
    if extra:
        raise AgqError(f"{label} has a tensor {extra[0]} that its config does not account for")
    for name, shape in expected.items():
        if name not in found:
            raise AgqError(f"{label} has no tensor {name}: the model is incomplete")
        if found[name] != shape:
            raise AgqError(f"{label}: {name} has shape {list(found[name])}, its config says {list(shape)}")


def open_source(model: str | os.PathLike | Source) -> Source:
    """Open a model to quantize.

    Parameters
    ----------
    model : str, path-like or Source
        A directory with ``config.json`` and safetensors, a ``.gguf`` file, a hub id such as
        ``"HuggingFaceTB/SmolLM2-135M-Instruct"``, or one of the names in `agq_tvm.quantize.known.KNOWN`.
        A source is returned as it is.

    Raises
    ------
    AgqError
        If there is no such model, it cannot be fetched, or it is damaged or not supported.
    """
    from agq_tvm.quantize.gguf_source import GgufSource

    if isinstance(model, Source):
        return model
    path, name = Path(model), str(model)
    if path.is_dir():
        return HuggingFaceSource(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return GgufSource(path)
        raise AgqError(f"{name} is not a model: give a directory with safetensors, or a .gguf file")
    if name.lower() in KNOWN:
        return GgufSource(fetch_known(name.lower()))
    if _HUB_ID.fullmatch(name):
        return HuggingFaceSource(_download(name), label=name)
    raise AgqError(
        f"there is no model {name}: give a directory, a .gguf file, a hub id (owner/name) or one of {', '.join(KNOWN)}"
    )


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise AgqError(f"fetching {hub_id} needs the Hugging Face client: pip install 'agq-tvm[quantize]'") from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except Exception as error:  # The hub client raises those of its HTTP library too, which changes.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AgqError(
            f"cannot fetch {hub_id} from the Hugging Face hub ({reason}): check the name and the network, or "
            "give a local directory"
        ) from error


class HuggingFaceSource(Source):
    """A directory with ``config.json`` and float safetensors, sharded or not."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        raw_config = read_json(path / "config.json", "Hugging Face model")
        label = label or str(path)
        if quantization_config(raw_config) is not None:
            raise AgqError(f"{label} is quantized already: quantize the model that it was made of")
        if raw_config.get("quantization_config") is not None:
            raise AgqError(f"{label} is quantized by another tool: give the float model")
        _take_end_tokens(path, raw_config)
        super().__init__(label, raw_config)
        self._path = path
        self._files = _with_base_prefix(self.config, _open_tensors(path, label))
        self._row_orders = _row_orders(self.config)
        found = {}
        for name, (file, stored_name) in self._files.items():
            part = file.get_slice(stored_name)
            if part.get_dtype() not in _FLOATS:
                raise AgqError(f"{label}: {name} is {part.get_dtype()}, only {', '.join(_FLOATS)} are supported")
            found[name] = tuple(part.get_shape())
        check_shapes(label, self.config, found)

    def _tensor(self, name: str) -> np.ndarray:
        file, stored_name = self._files[name]
        try:
            value = file.get_tensor(stored_name).astype("float32")
            return value[self._row_orders[name]] if name in self._row_orders else value
        except (SafetensorError, OSError) as error:
            raise AgqError(f"{self.label}: cannot read {name} ({error})") from error

    def copy_tokenizer(self, directory: Path) -> None:
        """Copy ``tokenizer.json``; fold a separate chat template into ``tokenizer_config.json``."""
        source = self._path / "tokenizer.json"
        check_tokenizer(source, self.config.vocab_size)
        shutil.copyfile(source, directory / "tokenizer.json")
        settings = {}
        if (self._path / "tokenizer_config.json").exists():
            settings = read_json(self._path / "tokenizer_config.json", "Hugging Face model")
        template = self._path / "chat_template.jinja"
        if template.exists():
            settings["chat_template"] = _read_text(template)
        write_json(directory / "tokenizer_config.json", settings)


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Check that ``tokenizer.json`` can be read and gives no token beyond the model's vocabulary."""
    from tokenizers import Tokenizer

    if not path.exists():
        raise AgqError(
            f"{path.parent} has no tokenizer.json: make one with transformers, "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise AgqError(f"{path} cannot be read as a tokenizer ({error})") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < vocab_size:
        raise AgqError(f"{path} has tokens up to {largest}, the model only {vocab_size} of them")


def _take_end_tokens(path: Path, raw_config: dict) -> None:
    """Let ``generation_config.json`` say which tokens end an answer, as transformers does."""
    if (path / "generation_config.json").exists():
        tokens = read_json(path / "generation_config.json", "Hugging Face model").get("eos_token_id")
        if tokens is not None:
            raw_config["eos_token_id"] = tokens


def _open_tensors(path: Path, label: str) -> dict:
    """Map every tensor name to the open file that holds it."""
    files = {}
    for file_path in _tensor_files(path, label):
        try:
            file = safe_open(file_path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise AgqError(f"cannot read {file_path} ({error})") from error
        for name in file.keys():
            if name in files:
                raise AgqError(f"{label}: {name} is in two of its files")
            files[name] = file
    return files


def _with_base_prefix(config: DecoderConfig, files: dict) -> dict[str, tuple]:
    """Give tensors their full names, which files of the bare decoder shorten; map them to (file, stored name)."""
    bare = not any(name.startswith(config.base_prefix) for name in files)
    head = f"{config.head}."
    return {
        config.base_prefix + name if bare and not name.startswith(head) else name: (file, name)
        for name, file in files.items()
    }


def _row_orders(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Map the weights and biases that are stored by head to the order in which their rows are used."""
    return {
        f"{config.layer_prefix.format(layer=layer)}{part}.{kind}": linear.row_order()
        for layer in range(config.num_layers)
        for linear in config.linears
        if linear.interleaved_heads
        for part in linear.parts
        for kind in ("weight", "bias")
    }


def _tensor_files(path: Path, label: str) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if not (path / "model.safetensors").exists():
            raise AgqError(f"{label} has no model.safetensors: only models in safetensors are read")
        return [path / "model.safetensors"]
    weight_map = read_json(index, "Hugging Face model").get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise AgqError(f"{index} does not name the files of the model: it is damaged")
    return [path / name for name in sorted(names)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AgqError(f"cannot read {path}: {error}") from error


def quantize_matrix(source: Source, name: str, scheme: Scheme) -> QuantizedLinear:
    """Quantize one matrix by a method that needs no calibration: ``"keep"`` or ``"rtn"``."""
    if scheme.method == "keep":
        return source.kept_linear(name)
    weight = source.tensor(f"{name}.weight")
    if scheme.weight_bits == 8:
        rounded = rtn_8bit(weight, scheme.group_of(weight.shape[1]))
    else:
        try:
            rounded = rtn(weight, scheme.group_of(weight.shape[1]), scheme.symmetric, scheme.integer_grid)
        except AgqError as error:
            raise AgqError(f"{name}: {error}") from error
    return replace(rounded, bias=source.bias(name))
