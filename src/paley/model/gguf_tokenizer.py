"""The tokenizer of a GGUF file, in transformers' form: the inverse of `export.gguf_tokenizer`.

Pieces, merges and special tokens are the file's. SentencePiece's BPE has scores in place of merges; a merge of two
pieces comes the earlier, the higher the score of what it makes.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from paley.arch.gguf import ALIKE, NO_BOS, SPLITS, Token
from paley.core.errors import PaleyError
from paley.format.gguf import GgufFile

__all__ = ["tokenizer_of"]

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPACE = "▁"


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerFast:
    """Errors: PaleyError for a kind of tokenizer, or a way to split text, that Paley does not read."""
    pieces, kinds = _key(file, "tokens"), file.get("tokenizer.ggml.token_type")
    kinds = kinds or [int(Token.NORMAL)] * len(pieces)
    ids = {name: file.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in _SPECIAL.items()}
    special = {f"{name}_token": pieces[i] for name, i in ids.items() if i is not None and i < len(pieces)}
    model = _key(file, "model")
    if model == "gpt2":
        made, adds_bos = _of_bytes(file, pieces), False
    elif model == "llama":
        unknown = next((pieces[i] for i, kind in enumerate(kinds) if kind == Token.UNKNOWN), special.get("unk_token"))
        made, adds_bos = _of_pieces(file, pieces, kinds, unknown), True
    else:
        raise PaleyError(f"{file.file}: tokenizer.ggml.model must be gpt2 or llama here, got {model!r}")
    added = [
        AddedToken(piece, special=kind == Token.CONTROL, normalized=False)
        for piece, kind in zip(pieces, kinds, strict=False)
        if kind in (Token.CONTROL, Token.USER_DEFINED)
    ]
    made.add_tokens(added)
    asked = file.get("tokenizer.ggml.add_bos_token")
    if not asked and file.get("tokenizer.ggml.pre") in NO_BOS:
        special.pop("bos_token", None)
    first = special.get("bos_token") if (adds_bos if asked is None else asked) else None
    last = special.get("eos_token") if file.get("tokenizer.ggml.add_eos_token") else None
    if first or last:
        tokens = [(piece, pieces.index(piece)) for piece in dict.fromkeys([first, last]) if piece]
        template = " ".join(part for part in (first, "$A", last) if part)
        made.post_processor = processors.TemplateProcessing(template, special_tokens=tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
    if isinstance(template := file.get("tokenizer.chat_template"), str):
        tokenizer.chat_template = template
    return tokenizer


def _key(file: GgufFile, name: str) -> Any:
    if (found := file.get(f"tokenizer.ggml.{name}")) is None:
        raise PaleyError(f"{file.file}: has no key tokenizer.ggml.{name}, and so no tokenizer")
    return found


def _of_bytes(file: GgufFile, pieces: list[str]) -> Tokenizer:
    """On bytes, with the file's merges."""
    name = str(_key(file, "pre"))
    if (steps := SPLITS.get(ALIKE.get(name, name))) is None:
        known = ", ".join([*SPLITS, *ALIKE])
        raise PaleyError(f"{file.file}: its tokenizer splits text by {name!r}, which Paley does not know; known are "
                         f"{known}; give the original checkpoint")  # fmt: skip
    merges = [tuple(merge.split(" ", 1)) for merge in _key(file, "merges")]
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in steps])
    made.decoder = decoders.ByteLevel()
    return made


def _step(step: dict[str, Any]) -> Any:
    if step["type"] == "Split":
        return pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated", invert=step["invert"])
    return getattr(pre_tokenizers, step["type"])(**{key: value for key, value in step.items() if key != "type"})


def _of_pieces(file: GgufFile, pieces: list[str], kinds: list[int], unknown: str | None) -> Tokenizer:
    """SentencePiece's: spaces belong to pieces, and what no piece has is bytes."""
    scores, index_of = _key(file, "scores"), {piece: index for index, piece in enumerate(pieces)}
    joined = [i for i, kind in enumerate(kinds) if kind == Token.NORMAL and len(pieces[i]) > 1]
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for index in joined:
        piece = pieces[index]
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in index_of and right in index_of:
                found.append((-scores[index], index_of[left], index_of[right], (left, right)))
    found.sort()
    made = Tokenizer(
        models.BPE(index_of, [pair for *_, pair in found], unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix") is not False
    spaces = normalizers.Replace(" ", _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return made
