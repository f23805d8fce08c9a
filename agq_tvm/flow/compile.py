"""Compile a quantized checkpoint into a bundle for one device."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory, sha256_file, write_json
from agq_tvm.flow.library import LibraryRequest, build_library
from agq_tvm.flow.packing import Packer, check_overflow, layout_name, offsets_dtype
from agq_tvm.kernels.attention_form import CACHES
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.models.decoder import PREFILL_BUCKETS
from agq_tvm.progress import progress, say
from agq_tvm.quantize.checkpoint import Checkpoint, read_checkpoint
from agq_tvm.runtime import bundle as bundles
from agq_tvm.targets import Device, load_device

DEFAULT_CONTEXT = 2048


def compile_checkpoint(
    checkpoint: str | Path,
    target: str,
    output: str | Path,
    context: int | None = None,
    debug_dump: str | Path | None = None,
    cache: str = CACHES[0],
    schedules: str | Path | None = None,
) -> dict:
    """Compile a checkpoint for a device.

    Parameters
    ----------
    checkpoint : path-like
        Made by `agq_tvm.flow.quantize.quantize`.
    target : str
        A device's name, its TOML file, or ``"host"``.
    output : path-like
        The bundle; takes its name only when it is complete.
    context : int, optional
        Length of the caches; the smaller of the model's and 2048 by default.
    debug_dump : path-like, optional
        Where to write the module after each phase.
    cache : str
        What keys and values are stored as, ``"float16"`` or ``"int8"``; values of log2 attention are int8 anyway.
    schedules : path-like, optional
        A library of tuned schedules instead of the user's own; the one that is shipped counts, too.

    Returns
    -------
    dict
        ``device``, ``instruction_set``, ``context``, ``bytes``, ``seconds``, and ``schedules``, see
        `agq_tvm.flow.schedules.Chooser.report`.

    Raises
    ------
    AgqError
        If the checkpoint is damaged or cannot be compiled, or nothing can be linked or written.
    """
    start = time.perf_counter()
    device = load_device(target)
    source = read_checkpoint(checkpoint)
    context = cache_length(source, context)
    if cache not in CACHES:
        raise AgqError(f"unknown cache {cache!r}: choose one of {', '.join(CACHES)}")
    say(f"compiling {checkpoint} for {device.name} ({device.instruction_set})")
    with fresh_directory(output, "bundle") as directory:
        paths = [str(path) if path else None for path in (debug_dump, schedules)]
        chosen = _build(source, target, device, context, cache, directory, *paths)
        size = sum(path.stat().st_size for path in directory.iterdir())
    return {
        "device": device.name,
        "instruction_set": device.instruction_set,
        "context": context,
        "bytes": size,
        "schedules": chosen,
        "seconds": round(time.perf_counter() - start, 2),
    }


def cache_length(checkpoint: Checkpoint, context: int | None) -> int:
    """Return the length of the caches: what was asked for, or the smaller of the model's and 2048; in whole 16."""
    limit = checkpoint.config.context_length
    chosen = min(limit, DEFAULT_CONTEXT) if context is None else context
    if not 16 <= chosen <= limit:
        raise AgqError(f"--context {chosen} is not between 16 and the model's {limit}")
    return -(-chosen // 16) * 16 if chosen < limit else chosen // 16 * 16


def _build(
    checkpoint: Checkpoint,
    target: str,
    device: Device,
    context: int,
    cache: str,
    directory: Path,
    dump: str | None,
    schedules: str | None,
) -> dict:
    """Fill the bundle's directory; return which schedules its kernels have."""
    isa = instruction_set(device.instruction_set, checkpoint.scheme.activation)
    offsets = offsets_dtype(checkpoint)
    check_overflow(checkpoint)
    scratch = directory / "scratch"
    scratch.mkdir()
    request = LibraryRequest(
        str(checkpoint.path),
        target,
        str(directory / bundles.LIBRARY),
        context,
        cache,
        offsets,
        str(scratch),
        dump,
        schedules,
    )
    tensors, chosen = build_library(request)
    shutil.rmtree(scratch)
    caches = [tensor for tensor in tensors if tensor[0].endswith(bundles.CACHES)]
    constants = progress(tensors[len(caches) :], "packing", unit="tensor")
    packer = Packer(checkpoint, isa, context, offsets)
    parameters = bundles.write_parameters(directory / bundles.PARAMETERS, constants, packer.array)
    for name in bundles.TOKENIZER_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)
    manifest = _manifest(checkpoint, device, context)
    manifest["layout"] = {
        "linears": isa.layout(checkpoint.scheme.weight_bits).name,
        "tables": layout_name(isa, checkpoint.scheme.head_bits),
    }
    manifest["cache"], manifest["caches"], manifest["schedules"] = cache, caches, chosen
    manifest["parameters"] = [asdict(parameter) for parameter in parameters]
    manifest["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(directory.iterdir())
    }
    write_json(directory / bundles.MANIFEST, manifest)
    return chosen


def _manifest(checkpoint: Checkpoint, device: Device, context: int) -> dict:
    config, scheme = checkpoint.config, checkpoint.scheme
    return {
        "format_version": bundles.FORMAT_VERSION,
        "checkpoint_sha256": sha256_file(checkpoint.path / "model.safetensors"),
        "versions": bundles.versions(),
        "device": {
            "name": device.name,
            "machine": device.machine,
            "instruction_set": device.instruction_set,
            "features": list(device.required_features),
            "threads": device.threads,
        },
        "model": {
            "family": config.family,
            "vocab_size": config.vocab_size,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "bos_token_id": config.bos_token_id,
            "eos_token_ids": list(config.eos_token_ids),
        },
        "quantization": {
            "method": scheme.method,
            "weight_bits": scheme.weight_bits,
            "group_size": scheme.group_size,
            "head_bits": scheme.head_bits,
            "activation": scheme.activation,
            "attention": scheme.attention,
        },
        "pruning": asdict(scheme.pruning) if scheme.pruning else None,
        "context": context,
        "buckets": list(PREFILL_BUCKETS),
    }
