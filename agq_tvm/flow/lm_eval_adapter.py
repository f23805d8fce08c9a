"""A bundle, a checkpoint or a float model as a model of lm-eval, the evaluation harness; needs ``agq-tvm[lm-eval]``."""

import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from agq_tvm.errors import AgqError
from agq_tvm.flow import evaluate, evaluate_bundle
from agq_tvm.progress import progress
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine, LocalSession, prompt_chunks
from agq_tvm.runtime.text import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from agq_tvm.quantize.reference import ReferenceModel

_MOST_NEW_TOKENS = 256  # where a task does not say


class Runner(Protocol):
    """What computes logits.

    Attributes
    ----------
    context : int
        Tokens that fit.
    end_tokens : tuple of int
        Any of them ends an answer; the first also stands before a text that has no context.
    """

    context: int
    end_tokens: tuple[int, ...]

    def predictions(self, prefix: list[int], suffix: list[int]) -> np.ndarray:
        """Return the logits of each token of `suffix`, float32 [n, V]."""

    def continuation(self, prompt: list[int], limit: int) -> Iterator[int]:
        """Yield the most likely continuation, up to an end token."""


class _Compiled:
    def __init__(self, path: str, threads: int | None) -> None:
        bundle = Bundle(path)
        self._engine = Engine(bundle, LocalSession(bundle, threads))
        self.context = self._engine.context
        self.end_tokens = tuple(bundle.manifest["model"]["eos_token_ids"])
        self.predictions = partial(evaluate_bundle.suffix_logits, self._engine)

    def continuation(self, prompt: list[int], limit: int) -> Iterator[int]:
        return self._engine.generate(prompt, limit, frozenset(self.end_tokens))


class _Reference:
    def __init__(self, reference: "ReferenceModel") -> None:
        self.context = reference.config.context_length
        self.end_tokens = reference.config.eos_token_ids
        self.predictions = partial(evaluate.suffix_logits, reference, prompt_chunks)

    def continuation(self, prompt: list[int], limit: int) -> Iterator[int]:
        found: list[int] = []
        while len(found) < limit:
            token = int(self.predictions(prompt, [*found, prompt[-1]])[-1].argmax())
            if token in self.end_tokens:
                return
            found.append(token)
            yield token


@register_model("agq")
class AgqModel(TemplateLM):
    """A model of ours, by greedy decoding and without a begin token; prompts are pruned if it prunes.

    Parameters
    ----------
    model : str
        A bundle, run on this machine, or what `agq_tvm.flow.evaluate.open_reference` takes, run by the reference.
    threads : int, optional
        Of a bundle; those of the device by default.
    """

    def __init__(self, model: str | os.PathLike, threads: int | None = None) -> None:
        super().__init__()
        if evaluate_bundle.is_bundle(model):
            self._runner: Runner = _Compiled(model, threads)
            self._tokenizer = load_tokenizer(model)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                reference, tokenizer = evaluate.open_reference(model, Path(scratch))
                self._tokenizer = load_tokenizer(tokenizer.parent)
            self._runner = _Reference(reference)
        if not self._runner.end_tokens:
            raise AgqError(f"{model} has no end token: give eos_token_id in its config.json")

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text without context."""
        return self._runner.end_tokens[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text; special tokens only where they are asked for."""
        return self._tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        answers = []
        for texts, context, continuation in requests if disable_tqdm else progress(requests, "scoring"):
            answers.append(self._scored(context, continuation))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows of the context; every token once."""
        answers = []
        for request in requests if disable_tqdm else progress(requests, "scoring", unit="text"):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._runner.context - 1, 1)
            answers.append(sum(self._scored(*make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to a stop string, an end token or the task's limit."""
        answers = []
        for request in requests if disable_tqdm else progress(requests, "generating", unit="text"):
            answers.append(self._continued(*request.args))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _scored(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether greedy decoding gives it."""
        room = self._runner.context - len(continuation)
        if room < 1:
            raise AgqError(
                f"a continuation of {len(continuation)} tokens does not fit the model's context of "
                f"{self._runner.context}: choose another task, or compile with a larger --context"
            )
        if not continuation:
            return 0.0, True
        logits = self._runner.predictions(context[-room:], continuation).astype("float64")
        rows = np.arange(len(continuation))
        largest = logits.max(axis=1)
        total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
        greedy = bool((logits.argmax(axis=1) == continuation).all())
        return float((logits[rows, continuation] - total).sum()), greedy

    def _continued(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("temperature"):
            raise AgqError("the task asks for sampling: agq decodes greedily, set do_sample to false")
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        limit = min(settings.get("max_gen_toks", _MOST_NEW_TOKENS), self._runner.context - 1)
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        tokens: list[int] = []
        text = ""
        for token in self._runner.continuation(prompt[-(self._runner.context - limit) :], limit):
            tokens.append(token)
            text = self._tokenizer.decode(tokens)
            if any(stop in text for stop in stops if stop):
                break
        return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]
