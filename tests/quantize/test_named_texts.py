"""Data sets by name, from made-up copies: only their forms are those of the real ones."""

import gzip
import json

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.quantize.named_texts import DATA_SETS, DIRECTORY
from agq_tvm.quantize.texts import load_text, title
from tests.missing import leave_out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    return tmp_path


def refuse(*_, **__):
    raise ConnectionError("no route\nto anywhere")


def put(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def json_lines(column: str, rows: list[str]) -> str:
    return "".join(json.dumps({column: row, "other": 1}) + "\n" for row in rows)


def test_plain_text_has_the_rows_that_the_hub_has(folder):
    put(folder / "wikitext-2-raw" / "wiki.test.raw", " \n = Swift = \n \n A swift flies .\n")
    put(folder / "wikitext-2-raw" / "wiki.train.raw", " = Other = \n")
    assert load_text("wikitext2")[0] == "\n\n = Swift = \n\n\n\n\n A swift flies .\n"
    assert load_text("wikitext2", "train")[0] == " = Other = \n"
    put(folder / "simple-examples" / "data" / "ptb.test.txt", " no it was n't <unk> \n black monday \n")
    assert load_text("ptb")[0] == "no it was n't <unk> black monday"


def test_c4_is_the_first_1100_documents(folder):
    rows = [f"document {i}\nof two lines" for i in range(1102)]
    put(folder / "en" / "c4-validation.00000-of-00008.json.gz", json_lines("text", rows))
    text, sha256 = load_text("c4")
    assert text == " ".join(rows[:1100])
    put(folder / "other" / "c4" / "train-0.jsonl", json_lines("text", ["a", "b"]))
    assert load_text("c4", "train") == load_text("c4", "train")
    assert load_text("c4", "train")[0] == "a b" and load_text("c4", "train")[1] != sha256


@pytest.mark.parametrize("name", DATA_SETS)
def test_ones_own_folders_are_read_in_order(folder, name):
    data_set = DATA_SETS[name]
    for shard, row in (("1", "third"), ("0", "second")):
        put(folder / name / f"{data_set.splits['test']}-{shard}.jsonl.gz", json_lines(data_set.column, [row, row]))
    put(folder / name / "train.jsonl", json_lines(data_set.column, ["other"]))
    assert load_text(name)[0] == data_set.between.join(["second", "second", "third", "third"])


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_the_hubs_own_files_are_found_in_its_cache(folder, name):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        leave_out("parquet", "pyarrow is missing: pip install -e '.[data]' for it")
    data_set = DATA_SETS[name]
    path = folder / "hub" / "datasets--x" / "snapshots" / "0" / data_set.files["test"]
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table({data_set.column: ["one", "", "three"]}), path)
    assert load_text(name)[0] == data_set.between.join(["one", "", "three"])
    parquet.write_table(pyarrow.table({"wrong": ["one"]}), path)
    with pytest.raises(AgqError, match=f"not a copy of {name}"):
        load_text(name)


def test_without_a_copy_the_hub_is_asked_for_the_same_file(tmp_path, monkeypatch):
    monkeypatch.delenv(DIRECTORY, raising=False)
    put(tmp_path / "fetched.json.gz", json_lines("text", ["far", "away"]))
    asked = []

    def fetch(repository, file, repo_type, revision):
        asked.append((repository, file, repo_type, revision))
        return str(tmp_path / "fetched.json.gz")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert load_text("c4")[0] == "far away"
    assert asked == [("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "dataset", "main")]


def test_neither_copy_nor_network_is_one_sentence(folder, monkeypatch):
    with pytest.raises(AgqError, match=r"no copy of ptb .*no route\): put ptb.test.txt .* AGQ_DATA") as error:
        load_text("ptb")
    assert "\n" not in str(error.value)
    monkeypatch.setenv(DIRECTORY, str(folder / "absent"))
    with pytest.raises(AgqError, match="not a directory"):
        load_text("ptb")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("c4/validation.jsonl", b"{"),
        ("c4/validation.jsonl", b'{"sentence": "a"}'),
        ("c4/validation.jsonl", b'{"text": 3}'),
        ("c4/validation.jsonl", b"[1]"),
        ("c4/validation.jsonl.gz", b"not gzip"),
        ("c4/validation.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9]),
        ("c4/validation.jsonl", b'{"text": "\xff"}'),
    ],
)
def test_damaged_copies_are_refused(folder, file, content):
    (folder / "c4").mkdir()
    (folder / file).write_bytes(content)
    with pytest.raises(AgqError, match="not a copy of c4"):
        load_text("c4")


def test_reports_say_which_part(tmp_path):
    assert title("c4") == "c4 validation"
    assert title("wikitext2", "train") == "wikitext2 train"
    assert (title("jargon"), title(tmp_path / "a.txt", "train")) == ("jargon", str(tmp_path / "a.txt"))
