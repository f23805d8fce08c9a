"""Continue a text with a bundle."""

import time
from collections.abc import Callable

from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine
from agq_tvm.runtime.sessions import open_session
from agq_tvm.runtime.text import load_tokenizer


def generate(
    bundle: str,
    prompt: str,
    limit: int = 64,
    threads: int | None = None,
    show: Callable[[str], None] | None = None,
    tracker: str | None = None,
    key: str | None = None,
) -> dict:
    """Generate the most likely continuation of a prompt.

    Parameters
    ----------
    bundle : path-like
    prompt : str
    limit : int
        Most tokens to generate.
    threads : int, optional
        Those of the device by default.
    show : callable, optional
        Called with the prompt, once the model is loaded, then with each new piece of text as it comes.
    tracker, key : str, optional
        A board to generate on, see `agq_tvm.runtime.sessions.open_session`.

    Returns
    -------
    dict
        ``prompt``, ``text`` (the continuation), ``prompt_tokens``, ``generated_tokens``, and ``seconds``: None on an
        emulated board.

    Raises
    ------
    AgqError
        If the bundle does not run here or the prompt does not fit.
    """
    loaded = Bundle(bundle)
    tokenizer = load_tokenizer(loaded.path)
    with open_session(loaded, threads, tracker, key) as session:
        result = _continue(Engine(loaded, session), tokenizer, prompt, limit, show)
        return result | ({"seconds": None} if session.emulated else {})


def _continue(engine: Engine, tokenizer, prompt: str, limit: int, show: Callable[[str], None] | None) -> dict:
    tokens = tokenizer.encode(prompt).ids
    start, produced, text = time.perf_counter(), [], ""
    if show:
        show(prompt)
    for token in engine.generate(tokens, limit, engine.stop):
        produced.append(token)
        longer = tokenizer.decode(produced)
        if show and not longer.endswith("\ufffd"):  # else a character that is not complete
            show(longer[len(text) :])
            text = longer
    shown, text = text, tokenizer.decode(produced)
    if show:
        show(text[len(shown) :])
    return {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": len(tokens),
        "generated_tokens": len(produced),
        "seconds": time.perf_counter() - start,
    }
