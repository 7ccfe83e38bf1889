"""DilateFormer: official checkpoints, and dilated attention against the published formula with nn.Unfold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from networks import DataError, DilateFormer
from networks.dilateformer import MLP, MultiScaleDilatedAttention, dilated_attention


def official_keys() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official tiny checkpoint, from its documentation rather than from our module."""
    keys: dict[str, tuple[int, ...]] = {}

    def norm(name: str, c: int, batch: bool) -> None:
        keys.update({f"{name}.weight": (c,), f"{name}.bias": (c,)})
        if batch:
            keys.update({f"{name}.running_mean": (c,), f"{name}.running_var": (c,), f"{name}.num_batches_tracked": ()})

    for i, (before, after) in enumerate([(3, 16), (16, 32), (32, 64), (64, 72)]):
        keys[f"patch_embed.proj.{3 * i}.weight"] = (after, before, 3, 3)
        if i < 3:
            norm(f"patch_embed.proj.{3 * i + 1}", after, batch=True)
    for s, (c, depth) in enumerate([(72, 2), (144, 2), (288, 6), (576, 2)]):
        for b in range(depth):
            block = f"stages.{s}.blocks.{b}"
            pointwise = (1, 1) if s < 2 else ()
            keys.update({f"{block}.pos_embed.weight": (c, 1, 3, 3), f"{block}.pos_embed.bias": (c,)})
            norm(f"{block}.norm1", c, batch=False)
            keys.update({f"{block}.attn.qkv.weight": (3 * c, c, *pointwise), f"{block}.attn.qkv.bias": (3 * c,)})
            keys.update({f"{block}.attn.proj.weight": (c, c), f"{block}.attn.proj.bias": (c,)})
            norm(f"{block}.norm2", c, batch=False)
            keys.update({f"{block}.mlp.fc1.weight": (4 * c, c), f"{block}.mlp.fc1.bias": (4 * c,)})
            keys.update({f"{block}.mlp.fc2.weight": (c, 4 * c), f"{block}.mlp.fc2.bias": (c,)})
        if s < 3:
            keys[f"stages.{s}.downsample.proj.0.weight"] = (2 * c, c, 3, 3)
            keys[f"stages.{s}.downsample.proj.0.bias"] = (2 * c,)
            norm(f"stages.{s}.downsample.proj.1", 2 * c, batch=True)
    norm("norm", 576, batch=False)
    keys.update({"head.weight": (1000, 576), "head.bias": (1000,)})
    return keys


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    """An official checkpoint as to names and shapes, with random values."""
    generator = torch.Generator().manual_seed(0)
    return {
        k: torch.tensor(7) if k.endswith("tracked") else torch.rand(s, generator=generator) * 0.1
        for k, s in official_keys().items()
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_official_checkpoint_loads_whole(checkpoint, wrapped, tmp_path):
    file = tmp_path / "dilateformer_tiny.pth"
    torch.save({"model": checkpoint, "epoch": 300} if wrapped else checkpoint, file)
    state = DilateFormer(pretrained=str(file)).state_dict()
    assert state.keys() == {k for k in checkpoint if not k.startswith(("norm.", "head."))}
    assert all(torch.equal(state[k], checkpoint[k]) for k in state)


def test_one_channel_equals_repeating_it_three_times(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "tiny.pth")
    gray = DilateFormer(1, pretrained=tmp_path / "tiny.pth").eval().double()
    colour = DilateFormer(3, pretrained=tmp_path / "tiny.pth").eval().double()
    x = torch.rand(1, 1, 40, 56, dtype=torch.float64)
    for a, b in zip(gray(x), colour(x.repeat(1, 3, 1, 1)), strict=True):
        torch.testing.assert_close(a, b)


def without(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(prefixes)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "stages.2.blocks.5."), r"depths \(2, 2, 5, 2\), not the tiny model's \(2, 2, 6, 2\)"),
        (lambda s: without(s, "stages.3."), r"depths \(2, 2, 6\)"),
        (lambda s: without(s, "stages.0.blocks.1.attn.qkv.bias"), r"1 missing: stages.0.blocks.1.attn.qkv.bias"),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, r"1 unexpected: extra.weight"),
        (
            lambda s: {**s, "patch_embed.proj.9.weight": torch.zeros(96, 64, 3, 3)},
            r"patch_embed.proj.9.weight is \[96, 64, 3, 3\] in the file, \[72, 64, 3, 3\] in the network",
        ),
        (lambda s: {"weights": 3}, "holds no state dict"),
    ],
)
def test_wrong_checkpoint_is_refused_by_name(checkpoint, change, message, tmp_path):
    file = tmp_path / "wrong.pth"
    torch.save(change(checkpoint), file)
    with pytest.raises(DataError, match=message) as error:
        DilateFormer(pretrained=str(file))
    assert str(file) in str(error.value)


def test_truncated_missing_and_unnamed_checkpoints(checkpoint, tmp_path):
    file = tmp_path / "tiny.pth"
    torch.save(checkpoint, file)
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(DataError, match="truncated"):
        DilateFormer(pretrained=str(file))
    with pytest.raises(FileNotFoundError, match="none.pth"):
        DilateFormer(pretrained=str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="github.com/JIAOJIAYUASD/dilateformer"):
        DilateFormer(pretrained=True)


def unfold_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, kernel: int, dilation: int) -> Tensor:
    """The plain way: every window copied out by nn.Unfold, then softmax(q k / sqrt(d)) v."""
    b, c, h, w = q.shape
    d = c // heads
    unfold = nn.Unfold(kernel, dilation, dilation * (kernel - 1) // 2, 1)
    q = q.reshape(b, heads, d, 1, h * w).permute(0, 1, 4, 3, 2)
    k = unfold(k).reshape(b, heads, d, kernel**2, h * w).permute(0, 1, 4, 2, 3)
    v = unfold(v).reshape(b, heads, d, kernel**2, h * w).permute(0, 1, 4, 3, 2)
    out = (q @ k / d**0.5).softmax(-1) @ v
    return out.permute(0, 1, 4, 3, 2).reshape(b, c, h, w)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize(("heads", "kernel", "size"), [(1, 3, (9, 12)), (2, 3, (5, 4)), (2, 5, (7, 7)), (1, 3, (2, 1))])
def test_dilated_attention_equals_unfold_with_all_gradients(heads, kernel, size, dilation):
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, *size, 8, generator=generator, dtype=torch.float64) for _ in range(4))

    def plain(*qkv: Tensor | int) -> Tensor:
        q, k, v, *window = qkv
        return unfold_attention(*(t.permute(0, 3, 1, 2) for t in (q, k, v)), *window).permute(0, 2, 3, 1)

    results = []
    for function in (dilated_attention, plain):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out = function(*inputs, heads, kernel, dilation)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


def test_multi_scale_attention_equals_its_groups_with_a_qkv_bias():
    torch.manual_seed(0)
    attention = MultiScaleDilatedAttention(12, num_heads=6).double()
    nn.init.normal_(attention.qkv.bias)
    x = torch.randn(2, 7, 6, 12, dtype=torch.float64)
    qkv = attention.qkv(x.permute(0, 3, 1, 2)).reshape(2, 3, 3, 4, 7, 6)
    groups = [unfold_attention(*qkv[:, :, g].unbind(1), heads=2, kernel=3, dilation=g + 1) for g in range(3)]
    expected = attention.proj(torch.cat(groups, 1).permute(0, 2, 3, 1))
    torch.testing.assert_close(attention(x), expected)
    with pytest.raises(ValueError, match="3 dilations"):
        MultiScaleDilatedAttention(12, num_heads=4)


def test_features_are_a_pyramid():
    features = DilateFormer(1).eval()(torch.zeros(1, 1, 65, 96))
    assert [tuple(f.shape[1:]) for f in features] == [(72, 17, 24), (144, 9, 12), (288, 5, 6), (576, 3, 3)]


def test_mlp_recomputes_its_activation_with_the_same_gradients():
    mlp, x = MLP(8), torch.rand(2, 3, 4, 8, requires_grad=True)
    inputs = [x, *mlp.parameters()]
    recomputed = torch.autograd.grad(mlp.train()(x).square().sum(), inputs)
    kept = torch.autograd.grad(mlp.eval()(x).square().sum(), inputs)
    for a, b in zip(recomputed, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_mlp_keeps_one_wide_map_for_the_backward_pass():
    wide = 2 * 3 * 4 * 32
    shapes = []

    def note(tensor):
        shapes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        MLP(8).train()(torch.rand(2, 3, 4, 8))
    assert shapes.count(wide) == 1
