"""Text in, text out: the tokenizer of a checkpoint or bundle."""

from pathlib import Path

from agq_tvm.errors import AgqError


def load_tokenizer(directory: str | Path):
    """Load ``tokenizer.json``.

    Raises
    ------
    AgqError
        If it is missing or not a tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise AgqError(f"{path} is missing: there is no tokenizer to read text with")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise AgqError(f"{path} is not a tokenizer ({error}): make the checkpoint again") from error
