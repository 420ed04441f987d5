import copy
import re

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from every_type import tiny_model
from paley.core.errors import PaleyError
from paley.eval import sampling
from paley.eval.sampling import sample_documents
from paley.model.pieces import Pieces

VOCAB, BOS, EOS = 260, 1, 2


def tiny(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options)).eval()


def force(model: nn.Module, logits: dict[int, float]) -> None:
    """Whatever the model computes, its logits are these, and -1e4 elsewhere."""
    fixed = torch.full((VOCAB,), -1e4)
    for token, value in logits.items():
        fixed[token] = value
    model.lm_head.register_forward_hook(lambda module, args, out: fixed.expand_as(out))


def sample(model, tokenizer, **options) -> Tensor:
    return sample_documents(model, tokenizer, **{"count": 5, "tokens": 12, "seed": 0, "batch": 2} | options)


def test_shape_bos_and_a_seed_that_decides(tiny_tokenizer):
    model = tiny()
    ids = sample(model, tiny_tokenizer)
    assert ids.shape == (5, 12)
    assert ids.dtype == torch.int64
    assert (ids[:, 0] == BOS).all()
    assert len({tuple(row) for row in ids.tolist()}) == 5
    torch.manual_seed(123)  # the global generator has no part in it
    assert torch.equal(sample(model, tiny_tokenizer), ids)
    assert torch.equal(sample(model, tiny_tokenizer, batch=8), ids)
    assert torch.equal(sample(model, tiny_tokenizer, tokens=7), ids[:, :7])
    others = sample(model, tiny_tokenizer, seed=1)
    assert not {tuple(row) for row in others.tolist()} & {tuple(row) for row in ids.tolist()}


@pytest.mark.parametrize("kind", ["bamba", "jamba", "rwkv"])
def test_models_that_cannot_go_on_from_a_cache_sample_all_the_same(kind, tiny_tokenizer, monkeypatch):
    model = tiny_model(kind, vocab_size=VOCAB)
    found = sample(model, tiny_tokenizer)
    monkeypatch.setattr(sampling, "pieces_of", lambda _: Pieces(cache=False))
    assert torch.equal(sample(model, tiny_tokenizer), found)


@torch.no_grad()
def test_each_token_is_drawn_from_the_whole_prefix(tiny_tokenizer):
    """Cached steps have the distributions of one long forward: replaying the draws on it gives the text."""
    model = tiny()
    ids = sample(model, tiny_tokenizer, count=3, tokens=20, seed=4)
    below = model(ids, use_cache=False).logits.softmax(-1).double().cumsum(-1)
    seeds = torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(4)).tolist()
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for t in range(19):
            chance = torch.rand(1, dtype=torch.float64, generator=generator) * below[row, t, -1]
            if ids[row, t] == EOS:
                assert ids[row, t + 1] == BOS
                continue
            assert ids[row, t + 1] == (below[row, t] <= chance).sum()


def test_temperature_is_one(tiny_tokenizer):
    model = tiny()
    force(model, {10: 0.0, 11: float(torch.tensor(3.0).log())})
    drawn = sample(model, tiny_tokenizer, count=40, tokens=51, batch=40)[:, 1:]
    assert set(drawn.unique().tolist()) == {10, 11}
    assert float((drawn == 11).float().mean()) == pytest.approx(0.75, abs=0.03)  # 2000 draws: 3 sigma


def test_after_eos_a_new_document_opens(tiny_tokenizer):
    model = tiny()
    force(model, {EOS: 0.0, 10: 0.0})
    ids = sample(model, tiny_tokenizer, count=4, tokens=40)
    is_eos = ids[:, :-1] == EOS
    assert is_eos.any()
    assert torch.equal(ids[:, 1:] == BOS, is_eos)


def test_one_token_for_both_ends_opens_by_itself(tiny_tokenizer):
    model = tiny()
    force(model, {EOS: 0.0, 10: 0.0})
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = tokenizer.eos_token
    ids = sample(model, tokenizer, count=4, tokens=40)
    assert (ids[:, 0] == EOS).all()
    assert set(ids.unique().tolist()) == {EOS, 10}


def test_without_bos_the_configs_serves_or_it_is_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    assert (sample(tiny(bos_token_id=9), tokenizer)[:, 0] == 9).all()
    with pytest.raises(PaleyError, match=r"has a BOS token .*calibration\.source"):
        sample(tiny(bos_token_id=None), tokenizer)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'user' %}{{ '\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chatting(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_chat_model_writes_both_turns_in_the_words_of_its_template(chatting):
    """A user's turn ends with a newline, an assistant's with EOS, and either with EOS drawn too early."""
    model, letters = tiny(), chatting("ab\n", add_special_tokens=False)["input_ids"]
    force(model, dict.fromkeys([*letters, EOS], 0.0))
    ids = sample(model, chatting, count=6, tokens=400)
    for row in ids:
        text = chatting.decode(row)
        opening, *turns = re.split(r"(\[user\]|\[assistant\])", text)
        assert opening == "<s>"
        assert turns[::4] == ["[user]"] * len(turns[::4])
        assert turns[2::4] == ["[assistant]"] * len(turns[2::4])
        for said in turns[1:-2:4]:
            assert re.fullmatch(r"[ab]*\n", said)
        for said in turns[3:-2:4]:
            assert re.fullmatch(r"[ab\n]*</s>", said)
        assert len(turns) > 8
    assert torch.equal(sample(model, chatting, count=6, tokens=300, batch=8), ids[:, :300])


def test_a_template_without_room_or_without_turns_is_refused(chatting):
    with pytest.raises(PaleyError, match=r"opens with 7 tokens, which leaves none of 7; .*calibration\.seq_len"):
        sample(tiny(), chatting, tokens=7)
    for template in ("{{ raise_exception('no') }}", "{{ messages[0]['content'] }}", "a fixed text"):
        chatting.chat_template = template
        with pytest.raises(PaleyError, match=r"takes no conversation .*calibration\.source"):
            sample(tiny(), chatting)


def test_bad_requests_and_bad_models_are_refused(tiny_tokenizer: PreTrainedTokenizerFast):
    model = tiny()
    for bad in ({"count": 0}, {"tokens": 1}, {"batch": 0}):
        with pytest.raises(PaleyError, match="{}={}".format(*next(iter(bad.items())))):
            sample(model, tiny_tokenizer, **bad)
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(PaleyError, match="NaN or infinite at position 0"):
        sample(model, tiny_tokenizer)
    with pytest.raises(PaleyError, match="training mode"):
        sample(model.train(), tiny_tokenizer)
