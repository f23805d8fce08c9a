"""What a compiled prefill costs, counted in multiply-accumulates of the rows that its kernels really run."""

from collections.abc import Iterator

from agq_tvm.models.decoder import PREFILL_BUCKETS, DecoderConfig, filled_tiles
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.runtime.engine import chunks

_KEYS_AT_ONCE = 16


def prefill_macs(config: DecoderConfig, tokens: int, pruning: PruningSchedule | None = None) -> int:
    """Count the multiply-accumulates of a prompt: linears, attention and the logits of each chunk's last row.

    Rows are those of the compiled functions: chunks are padded, and what pruning leaves of them is rounded up. A
    product of 8-bit codes counts like one of floats.

    Parameters
    ----------
    config : DecoderConfig
    tokens : int
        Length of the prompt.
    pruning : PruningSchedule, optional
    """
    pruned = pruning.layers if pruning else ()
    cached = [0] * (len(pruned) + 1)
    per_row = [sum(linear.rows) * linear.in_features for linear in config.linears]
    projection = config.hidden_size * config.embedding_size
    logits = config.vocab_size * config.embedding_size + (projection if config.project_out else 0)
    total = 0
    for rows, valid in chunks(tokens, PREFILL_BUCKETS):
        counts = pruning.counts(valid) if pruning else (valid,)
        total += logits + (rows * projection if config.project_in else 0)
        for before, after, segment in _layers(config, rows, pruning):
            total += before * sum(per_row[:2]) + after * sum(per_row[2:])
            total += 2 * config.num_heads * config.head_dim * _keys(cached[segment], before)
        cached = [there + count for there, count in zip(cached, counts, strict=True)]
    return total


def speedup(config: DecoderConfig, tokens: int, pruning: PruningSchedule) -> float:
    """Return by how many times pruning lowers what `prefill_macs` counts."""
    return prefill_macs(config, tokens) / prefill_macs(config, tokens, pruning)


def _layers(config: DecoderConfig, rows: int, pruning: PruningSchedule | None) -> Iterator[tuple[int, int, int]]:
    """Give each layer's rows in attention, its rows in the MLP, and its segment."""
    # Decoding's function, which a chunk of one row runs in, drops nothing.
    counts = iter(pruning.counts(rows)[1:] if pruning and rows > 1 else ())
    segment = 0
    for layer in range(1, config.num_layers + 1):
        before, here = rows, segment
        if pruning and layer in pruning.layers:
            rows, segment = min(rows, filled_tiles(next(counts, rows))), segment + 1
        yield before, rows, here


def _keys(cached: int, rows: int) -> int:
    """Return how many keys all rows of a chunk multiply with, in whole vectors."""
    return sum(-(-(cached + row + 1) // _KEYS_AT_ONCE) * _KEYS_AT_ONCE for row in range(rows))
