import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core.errors import PaleyError
from paley.data import TokenBlocks, blocks_from_ids
from paley.eval.reference import Reference

VOCAB = 31


def tiny(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def some_blocks(seq_len: int = 11) -> TokenBlocks:
    ids = torch.randint(VOCAB, (5, seq_len), generator=torch.Generator().manual_seed(1))
    return blocks_from_ids(ids, "calibration", "random")


def logits(reference: Reference) -> torch.Tensor:
    """[all tokens, vocab]."""
    return torch.cat([few for _, few in reference.slices(reference.hidden.flatten(0, 1))], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_the_models_own(dtype):
    model, blocks = tiny().to(dtype), some_blocks(seq_len=300)  # more than a few tokens
    reference = Reference.of(model, blocks, batch=5)
    own = model(blocks.ids).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.05  # half a unit in the last place of the largest logits
    torch.testing.assert_close(logits(reference), own.flatten(0, 1), rtol=0, atol=tolerance)
    expected = torch.nn.functional.cross_entropy(
        own[:, :-1].float().transpose(1, 2), blocks.ids[:, 1:], reduction="none"
    )
    torch.testing.assert_close(reference.nll, expected, rtol=0, atol=tolerance)
    assert reference.hidden.dtype == torch.float32
    assert reference.hidden.shape == (5, 300, 16)
    assert reference.head.dtype == dtype


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_same_after_the_file_and_after_the_model_changed(tmp_path, tied):
    model, blocks = tiny(tie_word_embeddings=tied), some_blocks()
    reference = Reference.of(model, blocks, batch=2)
    reference.save(tmp_path / "r.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]
    before = logits(reference)
    model.lm_head.weight.data.zero_()  # a rotation in place, say
    assert torch.equal(logits(reference), before)
    loaded = Reference.load(tmp_path / "r.safetensors", blocks)
    for name in ("hidden", "head", "nll"):
        assert torch.equal(getattr(loaded, name), getattr(reference, name))
    assert (loaded.source, loaded.sha256) == ("random", blocks.sha256)
    assert torch.equal(logits(Reference.load(tmp_path / "r.safetensors")), before)


def test_a_file_that_is_no_whole_reference_is_refused_by_name(tmp_path):
    path = tmp_path / "r.safetensors"
    with pytest.raises(PaleyError, match=r"r\.safetensors: cannot be read"):
        Reference.load(path)
    Reference.of(tiny(), some_blocks()).save(path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        good = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)

    def refused(message: str, tensors: dict, metadata: dict | None) -> None:
        save_file(tensors, path, metadata)
        with pytest.raises(PaleyError, match=message):
            Reference.load(path)

    refused("no reference of this version", good, None)
    refused("no reference of this version", good, metadata | {"version": "2"})
    refused("no reference of this version", good, {k: v for k, v in metadata.items() if k != "sha256"})
    refused("cannot be read", {k: v for k, v in good.items() if k != "nll"}, metadata)
    refused("needs hidden", good | {"head": good["head"][:, :-1].contiguous()}, metadata)
    refused("needs finite nll", good | {"nll": good["nll"][:-1].contiguous()}, metadata)
    refused("needs finite nll", good | {"nll": good["nll"] * torch.nan}, metadata)
    refused("holds torch.float16", good | {"hidden": good["hidden"].half()}, metadata)
    save_file(good, path, metadata)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(PaleyError, match=r"r\.safetensors: cannot be read"):
        Reference.load(path)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "r.safetensors"
    reference = Reference.of(tiny(), some_blocks())
    reference.save(path)
    whole = path.read_bytes()

    def full(file, chunk):
        file.write(bytes(chunk)[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("paley.core.files._write", full)
    with pytest.raises(PaleyError, match=rf"the disk is full.* needs {len(whole):,} bytes"):
        reference.save(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]
