"""WikiText-2, C4 and PTB by name: from a directory of one's own, or from the Hugging Face hub."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from agq_tvm.errors import AgqError

DIRECTORY = "AGQ_DATA"
"""The environment variable that names a directory of local copies."""
_JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


@dataclass(frozen=True)
class DataSet:
    """One data set, and how its rows become one text.

    Attributes
    ----------
    repository, revision : str
        On the hub.
    files : dict of str
        What is fetched from there, for ``"test"`` and ``"train"``.
    splits : dict of str
        What these two are called in the data set.
    copies : dict of str
        The name that a copy from elsewhere is known by.
    column : str
        Of tables and JSON lines, holds the text.
    between : str
        Joins rows.
    row : callable or None
        Makes a row of a line of plain text; None if a row can have several lines.
    documents : int or None
        Take only so many rows from the beginning.
    """

    repository: str
    revision: str
    files: dict[str, str]
    splits: dict[str, str]
    copies: dict[str, str]
    column: str
    between: str
    row: Callable[[str], str] | None
    documents: int | None = None


# Joined as GPTQ's evaluation does, which others follow: its wikitext2, its c4-new and its ptb-new.
DATA_SETS = {
    "wikitext2": DataSet(
        repository="Salesforce/wikitext",
        revision="main",
        files={split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("test", "train")},
        splits={"test": "test", "train": "train"},
        copies={"test": "wiki.test.raw", "train": "wiki.train.raw"},
        column="text",
        between="\n\n",
        row=lambda line: line if line.strip() else "",
    ),
    "c4": DataSet(
        repository="allenai/c4",
        revision="main",
        files={"test": "en/c4-validation.00000-of-00008.json.gz", "train": "en/c4-train.00000-of-01024.json.gz"},
        splits={"test": "validation", "train": "train"},
        copies={"test": "c4-validation.00000-of-00008.json.gz", "train": "c4-train.00000-of-01024.json.gz"},
        column="text",
        between=" ",
        row=None,
        documents=1100,
    ),
    "ptb": DataSet(
        repository="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        files={split: f"penn_treebank/{split}/0000.parquet" for split in ("test", "train")},
        splits={"test": "test", "train": "train"},
        copies={"test": "ptb.test.txt", "train": "ptb.train.txt"},
        column="sentence",
        between=" ",
        row=str.strip,
    ),
}


def load_named(name: str, use: str) -> str:
    """Load a data set as one text.

    Parameters
    ----------
    name : str
        In `DATA_SETS`.
    use : {"test", "train"}
        Text to test with, or to calibrate with.

    Raises
    ------
    AgqError
        If there is no copy and it cannot be fetched, or what is found is not such a data set.
    """
    data_set = DATA_SETS[name]
    paths = _local_copy(name, data_set, use) or [_fetched(name, data_set, use)]
    rows = chain.from_iterable(_rows(name, data_set, path) for path in paths)
    return data_set.between.join(islice(rows, data_set.documents))


def _local_copy(name: str, data_set: DataSet, use: str) -> list[Path]:
    """Find the files of a copy below the directory of one's own."""
    directory = os.environ.get(DIRECTORY)
    if not directory:
        return []
    if not Path(directory).is_dir():
        raise AgqError(f"{DIRECTORY} names {directory}, which is not a directory: set it to one with data sets")
    suffixes = (*_JSON, ".parquet") if data_set.row is None else (".txt", *_JSON, ".parquet")
    own = [f"{name}/{data_set.splits[use]}*{suffix}" for suffix in suffixes]
    for pattern in (data_set.copies[use], data_set.files[use], *own):
        found = sorted(path for path in Path(directory).rglob(pattern) if path.is_file())
        if found:
            return [path for path in found if path.parent == found[0].parent]
    return []


def _fetched(name: str, data_set: DataSet, use: str) -> Path:
    wanted = f"put {data_set.copies[use]} into a directory and name that in {DIRECTORY}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise AgqError(
            f"fetching {name} needs the Hugging Face client (pip install 'agq-tvm[data]'), or {wanted}"
        ) from error
    try:
        return Path(
            hf_hub_download(data_set.repository, data_set.files[use], repo_type="dataset", revision=data_set.revision)
        )
    except Exception as error:  # The hub client raises those of its HTTP library too, which changes.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AgqError(f"there is no copy of {name} and it cannot be fetched ({reason}): {wanted}") from error


def _rows(name: str, data_set: DataSet, path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        rows = _parquet_rows(path, data_set.column)
    elif path.name.endswith(_JSON):
        rows = (json.loads(line)[data_set.column] for line in _lines(path))
    else:
        rows = map(data_set.row, _lines(path))
    try:
        for row in rows:
            if not isinstance(row, str):
                raise ValueError(f"{data_set.column} is not a text")
            yield row
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise AgqError(f"{path} is not a copy of {name} ({type(error).__name__}: {error}): get it again") from error


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        yield from file


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise AgqError(f"reading {path} needs pyarrow: pip install 'agq-tvm[data]'") from error
    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise KeyError(column)
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()
