"""The kernels of a model that can be tuned, and how often they run."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.kernels import tunable
from agq_tvm.kernels.attention_form import AttentionKernel, attention_form
from agq_tvm.kernels.attrs import description_of
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.models.decoder import PREFILL_BUCKETS
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.runtime.engine import chunks
from agq_tvm.targets import Device
from agq_tvm.tuning.task import Task, make_task

PREFILL = 512
"""Tokens of the prompt that kernels are weighted by, beside a decode step."""


def extract_tasks(checkpoint: str | Path, device: Device, context: int, cache: str) -> list[Task]:
    """Return the tasks of a checkpoint: every kernel with a design space once, in decode and in all buckets.

    Parameters
    ----------
    checkpoint : path-like
    device : Device
    context : int
        Length of the caches.
    cache : str
        What keys and values are stored as.

    Raises
    ------
    AgqError
        If the checkpoint is damaged, or nothing in it can be tuned.
    """
    source = read_checkpoint(checkpoint)
    isa = instruction_set(device.instruction_set, source.scheme.activation)
    counts = _count_kernels(source, isa, context, cache)
    tasks: dict[str, Task] = {}
    for kernel, count in counts.items():
        for variant in tuned_variants(kernel):
            if tunable.space_of(variant, isa, device.threads) is not None:
                task = make_task(variant, isa.name, device, device.threads, count)
                before = tasks.get(task.name)
                tasks[task.name] = replace(task, count=task.count + before.count) if before else task
    if not tasks:
        raise AgqError(f"nothing in {checkpoint} can be tuned for {device.name} ({isa.name})")
    return list(tasks.values())


def tuned_variants(kernel) -> list:
    """Return the kernels that stand for one when it is tuned: attention of several lengths, else the kernel itself."""
    if not isinstance(kernel, AttentionKernel):
        return [kernel]
    reached = [context for context in tunable.CONTEXTS if context <= kernel.context] or tunable.CONTEXTS[:1]
    return [tunable.specialized(kernel, context) for context in reached if context >= kernel.rows]


def _count_kernels(source, isa, context: int, cache: str) -> dict:
    """Return how often each kernel runs in a decode step and a prefill; kernels of other buckets 0 times."""
    from agq_tvm.flow.decoder_calls import calls_of, decoder_until
    from agq_tvm.flow.library import linear_format
    from agq_tvm.flow.packing import offsets_dtype

    attention = attention_form(isa, cache, CODE_BOOKS.get(source.scheme.attention))
    format = linear_format(source.scheme, offsets_dtype(source))
    module = decoder_until("schedule_kernels", source, format, isa, context, attention)
    described = {gvar.name_hint: description_of(func) for gvar, func in module.functions_items()}
    kernels = {name: tunable.described(value, isa) for name, value in described.items() if value}
    runs = Counter({"decode": 1}) + Counter(f"prefill_{rows}" for rows, _ in chunks(PREFILL, PREFILL_BUCKETS))
    counts = dict.fromkeys(kernels.values(), 0)
    for function, calls in calls_of(module).items():
        for call in calls:
            name = call.args[0].name_hint
            if name in kernels:
                counts[kernels[name]] += runs[function]
    return counts
