"""Texts become documents, documents become blocks of one role, and every bad source is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from paley import data
from paley.core.errors import PaleyError
from paley.data import blocks, texts


def passage(seed: int, length: int = 2100) -> str:
    """A text that no other seed gives."""
    return " ".join(f"word{seed}x{i}" for i in range(length))[:length]


@pytest.fixture
def story_file(tmp_path):
    """20 documents of 2100 characters."""
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(passage(i) for i in range(20)), encoding="utf-8")
    return str(path)


def test_tiny_tokenizer_round_trips_and_saves(tiny_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    assert len(tiny_tokenizer) == 260
    tiny_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Füße, naïve\n\n\t 3 bits <b>"
    ids = again(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert again.decode(ids) == text
    assert (again.bos_token_id, again.eos_token_id) == (1, 2)


# Sources


def test_endoftext_lines_separate_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\nmore <|endoftext|> inline\r\n<|endoftext|> \r\n\r\n<|endoftext|>\ntwo\n")
    assert data.documents(str(path)) == ["one\nmore <|endoftext|> inline", "two"]


@pytest.mark.parametrize(("separator", "joined"), [("\n\n", "\n\n"), ("\n \n\n", "\n\n"), ("\n", "\n")])
def test_paragraphs_join_to_passages(tmp_path, separator, joined):
    paragraphs = [passage(i, 700) for i in range(10)]
    path = tmp_path / "a.txt"
    path.write_text(separator.join(paragraphs) + "\n", encoding="utf-8")
    found = data.documents(str(path))
    assert found == [joined.join(paragraphs[i:j]) for i, j in ((0, 3), (3, 6), (6, 10))]


def test_short_file_is_one_passage(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo", encoding="utf-8")
    assert data.documents(str(path)) == ["one\n\ntwo"]


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\u2028x", "id": 3}\n\n{"text": "  "}\n{"text": "two"}\n', encoding="utf-8")
    assert data.documents(str(path)) == ["one\u2028x", "two"]


def test_pydoc_has_enough_for_every_role_and_no_paragraph_twice():
    found = data.documents("pydoc")
    assert found == data.documents("pydoc")
    paragraphs = [" ".join(p.split()) for text in found for p in texts.BLANK_LINES.split(text)]
    assert len(paragraphs) == len(set(paragraphs))
    # The default recipe needs this many tokens; large vocabularies take 4 to 5 characters for each.
    sizes = {role: sum(map(len, data.role_part(found, role))) for role in blocks.ROLES}
    assert sizes["calibration"] > 65536 * 6
    assert sizes["search"] > 8192 * 6
    assert sizes["test"] > 32768 * 5


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n<|endoftext|>\n", "holds no text"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("latin.txt", "naïve".encode("latin-1"), r"latin\.txt: is not UTF-8 text \(byte 2"),
        ("a.jsonl", b'{"text": "x"}\nword\n', "line 2: is not JSON"),
        ("b.jsonl", b'{"content": "x"}\n', "line 1: .*\"text\", got NoneType; fields are 'content'"),
        ("c.jsonl", b'{"text": 3}\n', 'string field "text", got int'),
        ("d.jsonl", b"[1]\n", "got list"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PaleyError, match=complaint):
        data.documents(str(path))


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(PaleyError, match="is a folder"):
        data.documents(str(tmp_path))
    with pytest.raises(PaleyError, match=r"nothing\.txt: no such text file; give a file, `pydoc`"):
        data.documents(str(tmp_path / "nothing.txt"))
    with pytest.raises(PaleyError, match="did you mean 'pydoc'"):
        data.documents("pydocs")
    with pytest.raises(PaleyError, match="cannot be read"):
        data.documents("a\0b")
    with pytest.raises(PaleyError, match="blocks_from_ids"):
        data.documents("self")


# The hub, through a stand-in for the `datasets` package


def hub(monkeypatch, rows, calls):
    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hub:owner/set", ("owner/set", None, "train")),
        ("hub:set:raw", ("set", "raw", "train")),
        ("hub:set:raw:test", ("set", "raw", "test")),
        ("hub:set::test", ("set", None, "test")),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_hub_sources(monkeypatch, source, call, offline):
    calls = []
    hub(monkeypatch, [{"text": "one"}, {"text": "two"}], calls)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert data.documents(source) == ["one", "two"]
    assert calls == [(*call, not offline)]


def test_hub_rows_that_are_lines_are_joined_to_passages(monkeypatch):
    rows = ["", " = Title = \n", "", passage(0, 1500) + "\n", passage(1, 1500) + "\n", "", passage(2) + "\n"]
    hub(monkeypatch, [{"text": row} for row in rows], [])
    assert len(data.documents("hub:wikitext")) == 2


def test_hub_reads_no_more_than_its_limit(monkeypatch):
    monkeypatch.setattr(texts, "HUB_CHARACTERS", 10)
    hub(monkeypatch, [{"text": "12345"}] * 5, [])
    assert data.documents("hub:large") == ["12345"] * 2


@pytest.mark.parametrize("source", ["hub:", "hub::raw", "hub:a:b:c:d"])
def test_hub_grammar(source):
    with pytest.raises(PaleyError, match=r"expected hub:DATASET\[:CONFIG\]\[:SPLIT\]"):
        data.documents(source)


def test_hub_errors_name_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PaleyError, match=r"pip install 'paley\[data\]', or use a text file \(source=FILE\)"):
        data.documents("hub:set")
    hub(monkeypatch, ConnectionError("Couldn't reach 'set'"), [])
    with pytest.raises(PaleyError, match=r"reach 'set'\); use a text file \(source=FILE\) or .*`pydoc`"):
        data.documents("hub:set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PaleyError, match=r"HF_HUB_OFFLINE is set.*source=FILE"):
        data.documents("hub:set")
    hub(monkeypatch, [{"question": "x", "answer": "y"}], [])
    with pytest.raises(PaleyError, match="fields are 'question', 'answer'"):
        data.documents("hub:set")
    hub(monkeypatch, ValueError('Unknown split "tset"'), [])
    with pytest.raises(PaleyError, match="Unknown split"):
        data.documents("hub:set::tset")


# Blocks


def test_blocks_open_with_bos_join_short_documents_and_waste_nothing():
    documents = [[11, 12], [21, 22, 23, 24, 25, 26, 27], [31]]
    assert list(blocks.fill_blocks(documents, 4, bos=1)) == [
        [1, 11, 12, 1],  # the second document has its BOS here and begins anew in the next block
        [1, 21, 22, 23],
        [1, 24, 25, 26],
        [1, 27, 1, 31],
    ]
    assert list(blocks.fill_blocks(documents, 4, bos=None)) == [[11, 12, 21, 22], [23, 24, 25, 26], [27, 31]]


def test_token_blocks_cover_the_text(story_file, tiny_tokenizer):
    made = data.token_blocks(story_file, tiny_tokenizer, role="test", count=160, seq_len=256, whole=True)
    assert made.ids.shape == (160, 256)
    assert made.ids.dtype == torch.int64
    assert (made.ids[:, 0] == tiny_tokenizer.bos_token_id).all()
    text = "".join(data.documents(story_file))
    kept = made.ids[made.ids != tiny_tokenizer.bos_token_id]
    assert text.startswith(tiny_tokenizer.decode(kept))
    assert made.source == story_file
    assert dataclasses.replace(made, ids=made.ids.clone()).sha256 == made.sha256


def test_without_bos_a_blank_line_ends_a_document(tmp_path, tiny_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo", encoding="utf-8")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    made = data.token_blocks(str(path), tokenizer, role="test", count=1, seq_len=10, whole=True)
    assert tokenizer.decode(made.ids[0]) == "one\n\ntwo\n\n"


def test_roles_share_no_text(story_file, tiny_tokenizer):
    made = [
        data.token_blocks(story_file, tiny_tokenizer, role=role, count=count, seq_len=128)
        for role, count in (("calibration", 230), ("search", 48), ("test", 48))
    ]
    data.check_disjoint(*made)
    decoded = [tiny_tokenizer.decode(m.ids.flatten()) for m in made]
    stories = [{i for i in range(20) if f"word{i}x" in text} for text in decoded]
    assert stories == [set(range(14)), {14, 15, 16}, {17, 18, 19}]


def test_parts_are_contiguous_and_complete():
    documents = [str(i) * (1 + i % 7) for i in range(100)]
    parts = [data.role_part(documents, role) for role in blocks.ROLES]
    assert [text for part in parts for text in part] == documents
    total = sum(map(len, documents))
    assert [round(sum(map(len, part)) / total, 2) for part in parts] == [0.7, 0.15, 0.15]
    assert [len(data.role_part(["one"], role)) for role in blocks.ROLES] == [1, 0, 0]


def test_seed_decides_the_order_except_for_test(story_file, tiny_tokenizer):
    def make(role, seed):
        return data.token_blocks(story_file, tiny_tokenizer, role=role, count=3, seq_len=64, seed=seed)

    assert torch.equal(make("calibration", 5).ids, make("calibration", 5).ids)
    assert make("calibration", 5).sha256 == make("calibration", 5).sha256
    assert make("calibration", 5).sha256 != make("calibration", 6).sha256
    assert tiny_tokenizer.decode(make("calibration", None).ids[0]).startswith("<s>word0x0 ")
    assert make("test", 5).sha256 == make("test", 6).sha256 == make("test", None).sha256


def test_tokenizes_no_more_than_needed(story_file, tiny_tokenizer):
    seen = []

    class Spy:
        bos_token_id = 1

        def __call__(self, text, **options):
            seen.append(text)
            return tiny_tokenizer(text, **options)

    data.token_blocks(story_file, Spy(), role="calibration", count=9, seq_len=256)
    assert len(seen) == 2


def test_too_short_a_text_says_what_it_has_and_what_is_needed(story_file, tiny_tokenizer):
    with pytest.raises(PaleyError, match=r"search part \(15% of its 20 documents\) has 6315 tokens, and 99 sequences"):
        data.token_blocks(story_file, tiny_tokenizer, role="search", count=99, seq_len=512)
    with pytest.raises(PaleyError, match=r"need 50688; use search\.sequences=\d+, or .*\(search\.source\)"):
        data.token_blocks(story_file, tiny_tokenizer, role="search", count=99, seq_len=512, whole=True)


@pytest.mark.parametrize(("count", "seq_len"), [(0, 8), (1, 1)])
def test_sizes_are_checked(tiny_tokenizer, count, seq_len):
    with pytest.raises(PaleyError, match="needs count >= 1 and seq_len >= 2"):
        data.token_blocks("pydoc", tiny_tokenizer, role="test", count=count, seq_len=seq_len)


def test_given_ids_are_checked_and_copied():
    ids = torch.arange(6, dtype=torch.int32).view(2, 3)
    made = data.blocks_from_ids(ids, "calibration", "self")
    ids.zero_()
    assert made.ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    same = data.blocks_from_ids(torch.arange(6).view(2, 3), "search", "other")
    assert same.sha256 == made.sha256
    assert data.blocks_from_ids(torch.arange(6).view(3, 2), "search", "other").sha256 != made.sha256
    with pytest.raises(PaleyError, match=r"self: token ids must be integers, got torch\.float32"):
        data.blocks_from_ids(torch.zeros(2, 2), "test", "self")
    with pytest.raises(PaleyError, match=r"int64 \[blocks, seq_len\] and not empty, got torch.int64 \[3\]"):
        data.blocks_from_ids(torch.arange(3), "test", "self")
    with pytest.raises(PaleyError, match="not empty"):
        data.blocks_from_ids(torch.zeros(0, 4, dtype=torch.int64), "test", "self")
    with pytest.raises(PaleyError, match="unknown role 'train'"):
        data.blocks_from_ids(torch.zeros(1, 4, dtype=torch.int64), "train", "self")  # pyright: ignore
    with pytest.raises(PaleyError, match=r"other: token ids have sha256 .*, expected 00"):
        dataclasses.replace(same, sha256="00")


def test_a_score_needs_role_test():
    made = data.blocks_from_ids(torch.zeros(1, 4, dtype=torch.int64), "calibration", "a.txt")
    assert data.require(made, "calibration") is made
    with pytest.raises(PaleyError, match=r"a\.txt: these blocks have role 'calibration', this needs role 'test'"):
        data.require(made, "test")


def test_shared_blocks_are_found():
    ids = torch.arange(20).view(4, 5)
    first = data.blocks_from_ids(ids, "calibration", "a.txt")
    data.check_disjoint(first, data.blocks_from_ids(ids, "calibration", "b.txt"))
    data.check_disjoint(first, data.blocks_from_ids(ids + 100, "test", "b.txt"))
    with pytest.raises(PaleyError, match=r"2 of 2 test blocks \(b\.txt\) are also among the calibration blocks \(a"):
        data.check_disjoint(first, data.blocks_from_ids(ids[1:3, :4], "test", "b.txt"))


def test_real_tokenizers_and_texts(shared_dir: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260k-llama")
    source = str(shared_dir / "data" / "text" / "tinystories_train_head_ajay.txt")
    made = data.token_blocks(source, tokenizer, role="calibration", count=4, seq_len=256)
    assert (made.ids[:, 0] == tokenizer.bos_token_id).all()
    assert made.ids.max() < 512
    tasks = shared_dir / "data" / "tasks" / "lambada_openai_test.jsonl"
    lines = tasks.read_text(encoding="utf-8").splitlines()
    assert data.documents(str(tasks)) == [json.loads(line)["text"] for line in lines]
