import hashlib
import itertools

import pytest
from tokenizers import Tokenizer

from agq_tvm.errors import AgqError
from agq_tvm.quantize.calibration import cut_windows, encode_text
from agq_tvm.quantize.texts import TEXTS, load_text
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("name", "beginning", "sha256"),
    [
        ("calibration", "The Common Swift", "162be40cae43d98f563b576529c2e79c41ae71772a1c52cb4c0f8acf6e7bf720"),
        ("persuasion", "Persuasion", "44caa03edc730b879e3ae57cbfdd48ffcf3343c61b69ce315d6258bd6726248e"),
        ("jargon", "Chapter\xa01.", "af91b7fb81ea37f6aa259b2b43fa2ab1db6982694a4f55a29826e49cd18e7a0c"),
    ],
)
def test_the_shipped_texts_do_not_change(name, beginning, sha256):
    text, digest = load_text(name)
    assert text.startswith(beginning)
    assert digest == sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert name in TEXTS


def test_a_file_is_taken_byte_for_byte(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("drei\r\nZeilen – ß\n".encode())
    assert load_text(path) == ("drei\r\nZeilen – ß\n", hashlib.sha256(path.read_bytes()).hexdigest())


def test_unusable_texts_are_refused(tmp_path):
    for content, words in ((b"", "is empty"), (b" \n", "is empty"), (b"ab\xff", "not UTF-8")):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(AgqError, match=words):
            load_text(tmp_path / "t")
    with pytest.raises(AgqError, match="there is no text"):
        load_text(tmp_path / "absent")
    with pytest.raises(AgqError, match="cannot read"):
        load_text(tmp_path)


@pytest.fixture
def tokenizer(tmp_path):
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_windows_are_spread_and_do_not_overlap(tmp_path, tokenizer):
    (tmp_path / "t").write_text("".join(chr(33 + i) for i in range(90)))
    ids = encode_text(tokenizer, (tmp_path / "t").read_text())
    assert cut_windows(tokenizer, tmp_path / "t", 3, 10) == [ids[0:10], ids[30:40], ids[60:70]]
    assert cut_windows(tokenizer, tmp_path / "t", 4, 10) == [ids[i : i + 10] for i in (0, 20, 40, 60)]
    everything = cut_windows(tokenizer, tmp_path / "t", 100, 10)
    assert [token for window in everything for token in window] == ids


def test_a_seed_draws_windows_that_do_not_overlap(tmp_path, tokenizer):
    (tmp_path / "t").write_text("".join(chr(33 + i) for i in range(90)))
    ids = encode_text(tokenizer, (tmp_path / "t").read_text())
    drawn = {seed: cut_windows(tokenizer, tmp_path / "t", 5, 10, seed) for seed in range(200)}
    assert drawn[3] == cut_windows(tokenizer, tmp_path / "t", 5, 10, 3)
    starts = {seed: [ids.index(window[0]) for window in windows] for seed, windows in drawn.items()}
    assert len({tuple(places) for places in starts.values()}) > 150
    for places in starts.values():
        assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(places))
    assert {min(places) for places in starts.values()} >= {0, 1, 2, 3}
    assert max(max(places) for places in starts.values()) == 80
    assert starts[7] == [2, 16, 33, 51, 66]


def test_a_short_text_gives_fewer_windows_and_says_so(tmp_path, tokenizer, capsys):
    (tmp_path / "t").write_text("x" * 35)
    assert len(cut_windows(tokenizer, tmp_path / "t", 4, 10)) == 3
    assert "35 tokens: 3 windows of 10 instead of 4" in capsys.readouterr().err
    assert len(cut_windows(tokenizer, tmp_path / "t", 3, 10, seed=0)) == 3
    assert capsys.readouterr().err == ""


def test_a_text_shorter_than_a_window_is_refused(tmp_path, tokenizer):
    (tmp_path / "t").write_text("short")
    with pytest.raises(AgqError, match="5 tokens, less than one window of 10"):
        cut_windows(tokenizer, tmp_path / "t", 3, 10)


def test_no_begin_token_is_added(tmp_path, tokenizer):
    with_begin = Tokenizer.from_file(str(tokenizer))
    from tokenizers.processors import TemplateProcessing

    with_begin.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    with_begin.save(str(tokenizer))
    assert with_begin.encode("ab").ids[0] == 1
    assert encode_text(tokenizer, "ab") == with_begin.encode("ab").ids[1:]


def test_a_broken_tokenizer_is_refused(tmp_path):
    with pytest.raises(AgqError, match="cannot be read as a tokenizer"):
        encode_text(tmp_path / "absent.json", "a")
