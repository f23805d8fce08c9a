"""How the loss of the float model depends on the inputs of its linears, layer by layer from the last to the first."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from agq_tvm.progress import progress
from agq_tvm.quantize.forward import attention_positions, layer_steps, read_norms, run_layer
from agq_tvm.quantize.mixed import MixedErrors, MixedFormat, allocate, mixed_errors
from agq_tvm.quantize.operators import float_linear
from agq_tvm.quantize.reference import float_entry, float_exit
from agq_tvm.quantize.source import Source

_WINDOWS = 8
_SAMPLED_TOKENS = 2048
Gradients = dict[str, tuple[Tensor, Tensor]]


def choose_formats(
    source: Source, windows: list[list[int]], group_size: int, budget: float
) -> dict[tuple[int, str], MixedFormat]:
    """Choose bits and steps for the inputs of all linears under a budget of average bits.

    Parameters
    ----------
    source : Source
    windows : list of lists of int
        Calibration tokens, windows of one length; up to 8 of them are looked at, evenly spread.
    group_size : int
    budget : float

    Returns
    -------
    dict
        By layer and name of the linear.

    Raises
    ------
    AgqError
        If the budget is less than 4-bit codes take.
    """
    chosen = windows[:: -(-len(windows) // _WINDOWS)]
    stride = max(1, len(chosen) * len(chosen[0]) // _SAMPLED_TOKENS)
    errors: dict[tuple[int, str], MixedErrors] = {}
    for layer, gradients in input_gradients(source, chosen):
        for name, (x, gradient) in gradients.items():
            errors[layer, name] = mixed_errors(x[::stride], gradient[::stride], group_size)
    return allocate(errors, group_size, budget)


def input_gradients(source: Source, windows: list[list[int]]) -> Iterator[tuple[int, Gradients]]:
    """Give the inputs of every linear and the gradients of the loss by them.

    The labels are drawn from what the model itself predicts, with a fixed seed, so that squared gradients are the
    diagonal of Fisher's matrix. Memory is that of one layer and of the windows' hidden states in front of each.

    Parameters
    ----------
    source : Source
    windows : list of lists of int
        Of one length.

    Yields
    ------
    layer : int
        From the last to the first.
    gradients : dict
        By the linear's name: inputs and gradients, float32 [T of all windows, K].
    """
    config, positions = source.config, attention_positions(source.config, len(windows[0]))
    steps = partial(layer_steps, config, positions=positions, half_cache=False)
    hidden, entry = [], float_entry(source)
    with torch.no_grad():
        hidden.append([entry(window) for window in windows])
        for layer in progress(range(config.num_layers), "running", unit="layer"):
            norms, linears = read_norms(config, layer, source.tensor), _linears(source, layer)
            hidden.append(
                [run_layer(steps(norms=norms, hidden=x), lambda name, x, of=linears: of[name](x)) for x in hidden[-1]]
            )
    upstream = _exit_gradients(source, hidden.pop())
    for layer in progress(reversed(range(config.num_layers)), "gradients", total=config.num_layers, unit="layer"):
        norms, linears = read_norms(config, layer, source.tensor), _linears(source, layer)
        found: dict[str, tuple[list[Tensor], list[Tensor]]] = {linear.name: ([], []) for linear in config.linears}
        for i, x in enumerate(hidden.pop()):
            upstream[i], inputs, gradients = _through_layer(partial(steps, norms=norms), linears, x, upstream[i])
            for name, (xs, gs) in found.items():
                xs.append(inputs[name])
                gs.append(gradients[name])
        yield layer, {name: (torch.cat(xs), torch.cat(gs)) for name, (xs, gs) in found.items()}


def _linears(source: Source, layer: int) -> dict:
    prefix = source.config.layer_prefix.format(layer=layer)
    return {
        linear.name: float_linear(source, [prefix + part for part in linear.parts]) for linear in source.config.linears
    }


def _exit_gradients(source: Source, hidden: list[Tensor]) -> list[Tensor]:
    """Return the gradients of the loss by the last layer's output."""
    exit, random = float_exit(source), torch.Generator().manual_seed(0)
    gradients = []
    for x in hidden:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = exit(x)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients.append(torch.autograd.grad(loss, x)[0])
    return gradients


def _through_layer(steps, linears: dict, hidden: Tensor, upstream: Tensor) -> tuple[Tensor, dict, dict]:
    """Return the gradient by a layer's input, the inputs of its linears, and the gradients by those."""
    inputs = {}

    def linear(name: str, x: Tensor) -> Tensor:
        inputs[name] = x
        return linears[name](x)

    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        out = run_layer(steps(hidden=hidden), linear)
    first, *gradients = torch.autograd.grad(out, [hidden, *inputs.values()], upstream)
    detached = {name: x.detach() for name, x in inputs.items()}
    return first, detached, dict(zip(inputs, gradients, strict=True))
