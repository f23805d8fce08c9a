"""The byte-level tokenizer inside a GGUF file, written as Hugging Face's `tokenizer.json`."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from agq_tvm.errors import AgqError
from agq_tvm.files import write_json

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _pre_tokenizer(name: object) -> pre_tokenizers.PreTokenizer | None:
    """Return how a text is cut into words, by llama.cpp's name for it; None if we do not know it."""
    if name in ("gpt-2", "default"):
        return _byte_level()
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])
    if name == "llama-bpe":
        words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated")
        return pre_tokenizers.Sequence([words, _byte_level(use_regex=False)])
    return None


def write_tokenizer(label: str, metadata: Mapping, vocab_size: int, directory: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template, if there is one).

    Parameters
    ----------
    label : str
        The file, for messages.
    metadata : mapping
        Of the GGUF file.
    vocab_size : int
        Rows of the model's embedding.
    directory : Path

    Raises
    ------
    AgqError
        If the tokenizer is of a kind that we do not know, or is damaged.
    """
    kind, words = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    cut = _pre_tokenizer(words)
    if kind != "gpt2" or cut is None:
        raise AgqError(
            f"{label} has a tokenizer of kind {kind!r} ({words!r}), which is not supported: quantize the "
            "Hugging Face model instead"
        )
    tokens = _strings(label, metadata, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens) or not 0 < len(tokens) <= vocab_size:
        raise AgqError(f"{label}: its {len(tokens)} tokens do not fit a vocabulary of {vocab_size}")
    tokenizer = _bpe(label, tokens, _strings(label, metadata, "tokenizer.ggml.merges"), words == "llama-bpe")
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added(label, metadata, tokens))
    names = {name: _token(label, metadata, tokens, name) for name in ("bos", "eos", "unknown", "padding")}
    if metadata.get("tokenizer.ggml.add_bos_token", words == "llama-bpe") and names["bos"] is not None:
        bos = names["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names["bos"],
        "eos_token": names["eos"],
        "unk_token": names["unknown"],
        "pad_token": names["padding"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    write_json(
        directory / "tokenizer_config.json",
        {name: value for name, value in settings.items() if value is not None},
    )


def _bpe(label: str, tokens: list[str], merges: list[str], ignore_merges: bool) -> Tokenizer:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise AgqError(f"{label} has a damaged tokenizer: {error}") from error


def _strings(label: str, metadata: Mapping, name: str) -> list[str]:
    value = metadata.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AgqError(f"{label} has no list {name}: its tokenizer is incomplete")
    return value


def _added(label: str, metadata: Mapping, tokens: list[str]) -> list[AddedToken]:
    """Return the tokens that are found in a text before it is cut into words."""
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(kinds, list) or len(kinds) not in (0, len(tokens)):
        raise AgqError(f"{label}: tokenizer.ggml.token_type does not have one entry for each token")
    return [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _token(label: str, metadata: Mapping, tokens: list[str], name: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise AgqError(f"{label}: {name}_token_id {index!r} is not one of its {len(tokens)} tokens")
    return tokens[index]
