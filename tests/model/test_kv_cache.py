import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from paley.core import rounding
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme
from paley.core.transforms import Transform
from paley.model.attention import attach_schemes
from paley.model.kv_cache import PackedKVCache, PackedKVLayer, cache_argument
from paley.ops.attention import PackedKV, pack_kv

HEAD_DIM = 16
R3 = Transform(HEAD_DIM, HEAD_DIM, HEAD_DIM)
SCHEME = AttentionScheme(ActivationScheme("int3", clip_ratio=0.9), ActivationScheme("uint4", group_size=8), R3)


def rand(tokens: int, seed: int = 0, batch: int = 2, heads: int = 3) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def read(layer: PackedKVLayer, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Everything in the layer, through an update that adds nothing."""
    keys, values = layer.update(rand(0, batch=batch), rand(0, batch=batch))
    return tuple(x.dequantize() if isinstance(x, PackedKV) else x for x in (keys, values))


@pytest.mark.parametrize(("grid", "group_size"), [("int3", None), ("uint2", 4), ("gauss3", 8), ("odd4", None)])
@pytest.mark.parametrize("transform", [None, R3, Transform(HEAD_DIM, 24, 12, seed=1)])
def test_packed_values_are_the_round_trip_bit_for_bit(grid, group_size, transform):
    scheme, x = ActivationScheme(grid, group_size=group_size), rand(5)
    packed = pack_kv(x, scheme, transform)
    rotated = x if transform is None else transform.apply(x)
    assert torch.equal(packed.dequantize(), rounding.round_trip(rotated, scheme, torch.float16))
    assert packed.shape == rotated.shape


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_are_what_the_bits_say(bits):
    layer = PackedKVLayer(
        AttentionScheme(ActivationScheme(f"int{bits}"), ActivationScheme(f"uint{bits}", group_size=4))
    )
    keys, values = layer.update(rand(7), rand(7))
    vectors, codes = 2 * 3 * 7, HEAD_DIM * bits // 8
    assert keys.nbytes == vectors * (codes + 2)
    assert values.nbytes == vectors * (codes + 4 * (2 + 1))
    assert layer.nbytes == keys.nbytes + values.nbytes


def test_bytes_of_a_whole_cache():
    model = tiny()
    attach_schemes(model, {"model.layers.1.self_attn": SCHEME})
    cache = PackedKVCache(model)
    with torch.no_grad():
        model(torch.arange(2 * 9).view(2, 9), **cache_argument(model, cache))
    vectors = 2 * 2 * 9  # batch, kv heads, tokens
    plain = vectors * HEAD_DIM * 4 * 2
    packed = vectors * ((6 + 2) + (8 + 2 * (2 + 1)))
    assert cache.nbytes == plain + packed
    assert [layer.nbytes for layer in cache.layers] == [plain, packed]
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("scheme", [SCHEME, AttentionScheme(), AttentionScheme(values=ActivationScheme("gauss2"))])
def test_pieces_add_up_and_room_stays_small(scheme):
    k, v = rand(300, 1), rand(300, 2)
    whole, pieces = PackedKVLayer(scheme), PackedKVLayer(scheme)
    whole.update(k, v)
    at = 0
    for size in [1, 1, 61, 1, 1, 100, 0, 135]:
        before = pieces.get_seq_length()
        assert pieces.get_mask_sizes(size) == (before + size, 0)
        pieces.update(k[:, :, at : at + size], v[:, :, at : at + size])
        at += size
        assert pieces.get_seq_length() == before + size
        room = sum(store.data.nbytes for store in pieces._stores())
        assert room <= pieces.nbytes * (1 + 1 / 8) + pieces.nbytes / pieces.get_seq_length() * 64
    for a, b in zip(read(whole), read(pieces), strict=True):
        assert torch.equal(a, b)


def test_growth_is_amortised():
    layer, moves, last = PackedKVLayer(SCHEME), 0, None
    for _ in range(1000):
        keys, _ = layer.update(rand(1), rand(1))
        moves += last is not None and keys.codes.data_ptr() != last
        last = keys.codes.data_ptr()
    assert moves < 20


def test_an_unquantized_side_is_exact():
    k, v = rand(4, 1), rand(4, 2)
    keys, values = PackedKVLayer(AttentionScheme(values=ActivationScheme("int2"), transform=R3)).update(k, v)
    assert torch.equal(keys, k)
    assert isinstance(values, PackedKV)


def test_crop_reorder_repeat_select_reset():
    k, v = rand(70, 1), rand(70, 2)
    layer = PackedKVLayer(SCHEME)
    layer.update(k, v)
    all_k, all_v = read(layer)

    layer.crop(-5)
    layer.crop(0)
    assert layer.get_seq_length() == 65
    layer.update(k[:, :, 65:], v[:, :, 65:])
    assert torch.equal(read(layer)[0], all_k)
    layer.crop(60)
    assert torch.equal(read(layer)[1], all_v[:, :, :60])
    layer.crop(-100)
    assert layer.get_seq_length() == 0

    layer.reset()
    assert not layer.is_initialized
    assert layer.nbytes == 0
    layer.update(k, v)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(read(layer)[0], all_k[[1, 0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(read(layer, 4)[1], all_v[[1, 1, 0, 0]])
    layer.batch_select_indices(torch.tensor([2, 1, 2]))
    assert torch.equal(read(layer, 3)[0], all_k[[0, 1, 0]])
    assert layer.get_max_length() == -1


def test_reset_allows_another_batch_size():
    layer = PackedKVLayer(SCHEME)
    layer.update(rand(3), rand(3))
    layer.reset()
    assert layer.update(rand(2, batch=5), rand(2, batch=5))[0].shape == (5, 3, 2, HEAD_DIM)


def test_no_gradient_enters_the_cache():
    k = rand(3).requires_grad_()
    for scheme in (SCHEME, AttentionScheme()):
        keys, _ = PackedKVLayer(scheme).update(k, k)
        assert not any(t.requires_grad for t in (keys.parts() if isinstance(keys, PackedKV) else [keys]))


WINDOW, SIZES = 8, [1, 3, 1, 5, 20, 0, 1, 7, 8, 9, 1]


@pytest.mark.parametrize("scheme", [SCHEME, AttentionScheme()])
def test_a_window_keeps_one_token_less_and_returns_what_the_new_ones_may_see(scheme):
    """As transformers' own sliding layers; and packed tokens are those of a layer that keeps all."""
    total = sum(SIZES)
    k, v = rand(total, 1), rand(total, 2)
    layer, whole, theirs = (
        PackedKVLayer(scheme, window=WINDOW),
        PackedKVLayer(scheme),
        DynamicSlidingWindowLayer(WINDOW),
    )
    theirs.lazy_initialization(k, v)
    assert layer.is_sliding
    assert layer.get_max_length() == WINDOW
    at = 0
    for size in SIZES:
        held = min(at, WINDOW - 1)
        assert layer.get_mask_sizes(size) == theirs.get_mask_sizes(size) == (held + size, at - held)
        new = k[:, :, at : at + size], v[:, :, at : at + size]
        keys, values = layer.update(*new)
        all_keys, all_values = whole.update(*new)
        plain, _ = theirs.update(*new)
        for made, kept in ((keys, all_keys), (values, all_values)):
            assert made.shape[2] == plain.shape[2] == held + size
            read, want = (x.dequantize() if isinstance(x, PackedKV) else x for x in (made, kept))
            assert torch.equal(read, want[:, :, want.shape[2] - held - size :])
        at += size
        assert layer.get_seq_length() == theirs.get_seq_length() == at
        assert layer.nbytes == whole.nbytes // at * min(at, WINDOW - 1)


def test_a_window_of_one_token_keeps_none():
    layer = PackedKVLayer(SCHEME, window=1)
    for size in (1, 3, 1):
        assert layer.update(rand(size), rand(size))[0].shape[2] == size
        assert layer.nbytes == 0


def test_room_for_a_window_does_not_grow():
    layer, rooms = PackedKVLayer(SCHEME, window=WINDOW), set()
    for _ in range(300):
        layer.update(rand(1), rand(1))
        rooms.add(sum(store.data.nbytes for store in layer._stores()))
    (room,) = rooms
    assert layer.nbytes == room // 64 * (WINDOW - 1)


def test_crop_goes_back_until_the_window_has_moved():
    k, v = rand(12, 1), rand(12, 2)
    layer = PackedKVLayer(SCHEME, window=WINDOW)
    layer.update(k[:, :, :7], v[:, :, :7])
    whole = read(layer)
    assert layer.is_croppable
    layer.crop(-4)
    assert layer.get_seq_length() == 3
    layer.update(k[:, :, 3:7], v[:, :, 3:7])
    for a, b in zip(read(layer), whole, strict=True):
        assert torch.equal(a, b)
    layer.update(k[:, :, 7:9], v[:, :, 7:9])
    assert not layer.is_croppable
    for tokens in (-1, 5):
        with pytest.raises(
            PaleyError, match=r"keeps the last 8 of 9 tokens and cannot go back to [58]; begin a new cache"
        ):
            layer.crop(tokens)
    layer.crop(0)
    layer.crop(9)
    assert layer.get_seq_length() == 9
    layer.reset()
    assert layer.is_croppable
    layer.update(k, v)
    assert layer.get_seq_length() == 12


def test_reordered_and_repeated_windows_go_on():
    k, v = rand(20, 1), rand(20, 2)
    layer, whole = PackedKVLayer(SCHEME, window=WINDOW), PackedKVLayer(SCHEME)
    for made in (layer, whole):
        made.update(k, v)
        made.reorder_cache(torch.tensor([1, 0]))
        made.batch_repeat_interleave(2)
    one = rand(1, 3, batch=4)
    keys, all_keys = layer.update(one, one)[0], whole.update(one, one)[0]
    assert torch.equal(keys.dequantize(), all_keys.dequantize()[:, :, -WINDOW:])


def test_models_with_other_layers_are_refused():
    model = tiny()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(PaleyError, match="llama has layers of type linear_attention"):
        PackedKVCache(model)


def test_two_modules_for_one_layer_are_refused():
    model = tiny()
    attach_schemes(model, {f"model.layers.{i}.self_attn": SCHEME for i in range(2)})
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(PaleyError, match=r"model\.layers\.1\.self_attn claims cache layer 0"):
        PackedKVCache(model)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()
