"""FIAS against its paper and design: the equations, the ablations, Monte Carlo attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import FIAS
from networks.fias import ContextAwareFusion, DMKEncoder, MixAttDecoder, MixingAttention, MonteCarloAttention
from networks.layers import SumFusion


def test_ablations_run_together_and_unknown_ones_are_refused():
    net = FIAS(1, 2, local_encoder=False, fusion="add", decoder="conv").eval()
    assert net(torch.zeros(1, 1, 40, 40)).shape == (1, 2, 40, 40)
    with pytest.raises(ValueError, match="fusion.*'caf', 'add'.*'cat'"):
        FIAS(1, 2, fusion="cat")
    with pytest.raises(ValueError, match="decoder.*'mixatt', 'conv'.*'unet'"):
        FIAS(1, 2, decoder="unet")


def test_monte_carlo_attention_is_random_in_training_and_the_average_in_evaluation():
    torch.manual_seed(0)
    attention, x = MonteCarloAttention(16), torch.randn(2, 16, 12, 12)
    attention.train()
    torch.manual_seed(5)
    first = [attention(x) for _ in range(20)]
    torch.manual_seed(5)
    again = [attention(x) for _ in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(a.flatten().tolist()) for a in first}) > 3
    attention.eval()
    torch.testing.assert_close(attention(x), attention.gate(x.mean((2, 3), keepdim=True)))


def test_monte_carlo_attention_draws_sizes_evenly_and_cells_within_them():
    attention = MonteCarloAttention(8)
    odds = attention.odds
    assert torch.allclose(torch.stack([odds[:9].sum(), odds[9:13].sum(), odds[13:].sum()]), torch.full((3,), 1 / 3))
    # One cell of a pooled size is the plain mean of its block: 6 x 6 splits evenly into 3 x 3 and 2 x 2.
    x = torch.randn(1, 8, 6, 6)
    blocks = [
        x[:, :, i : i + 6 // n, j : j + 6 // n].mean((2, 3), keepdim=True)
        for n in (3, 2, 1)
        for i in range(0, 6, 6 // n)
        for j in range(0, 6, 6 // n)
    ]
    possible = [attention.gate(block) for block in blocks]
    for _ in range(30):
        drawn = attention.train()(x)
        assert any(torch.allclose(drawn, p, atol=1e-6) for p in possible)


def test_context_aware_fusion_equals_equations_3_to_6():
    torch.manual_seed(0)
    caf = ContextAwareFusion(8).double()
    a, b = torch.randn(2, 8, 5, 7).double(), torch.randn(2, 8, 5, 7).double()
    both = torch.cat([a, b], 1)
    average = caf.channel_avg(both).mean((2, 3), keepdim=True)  # as printed: convolution, then pooling
    maximum = caf.channel_max(both).flatten(2).max(2).values[..., None, None]
    w_channel = torch.sigmoid(caf.channel(torch.cat([average, maximum], 1)))
    fused = caf.reduce(w_channel * both)
    w_spatial = torch.sigmoid(caf.spatial(caf.spatial_in[0](a) + caf.spatial_in[1](b)))
    torch.testing.assert_close(caf([a, b]), w_spatial * fused)
    torch.testing.assert_close(SumFusion()([a, b]), a + b)


def mixing_attention(attention: MixingAttention, p1: Tensor, num_heads: int) -> Tensor:
    """Eq. 8 to 10 as printed, without eq. 10's convolution."""
    b, c, h, w = p1.shape
    tokens = F.layer_norm(p1.flatten(2).transpose(1, 2), (c,), attention.norm.weight, attention.norm.bias)
    mhsa = attention.self_attention
    q, k, v = (
        t.unflatten(2, (num_heads, c // num_heads)).transpose(1, 2)
        for t in F.linear(tokens, mhsa.qkv.weight, mhsa.qkv.bias).chunk(3, 2)
    )
    weights = (q @ k.transpose(2, 3) / (c // num_heads) ** 0.5).softmax(3)
    attended = F.linear((weights @ v).transpose(1, 2).flatten(2), mhsa.proj.weight, mhsa.proj.bias)
    attended = attended.transpose(1, 2).unflatten(2, (h, w))
    p2 = attended + p1
    return p2 * attention.monte_carlo(p2) + attended


def test_mixing_attention_equals_equations_8_to_10():
    torch.manual_seed(0)
    attention, x = MixingAttention(16, 4).double().eval(), torch.randn(2, 16, 5, 3).double()
    torch.testing.assert_close(attention(x), mixing_attention(attention, x, num_heads=4))


def conv_norm_relu(layers: nn.Sequential, x: Tensor, **conv: int) -> Tensor:
    """ReLU(BN(Conv(x))), by the statistics of the batch in training and by those kept in evaluation."""
    convolution, norm, _ = layers
    statistics = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    x = F.conv2d(x, convolution.weight, **conv)
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, training=norm.training).clamp(min=0)


def in_double(module: nn.Module, training: bool) -> nn.Module:
    """The module in 64 bit, its batch normalisations unlike their initial identity."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    return module.double().train(training)


@pytest.mark.parametrize("training", [False, True])
def test_dmk_encoder_equals_equations_1_and_2(training):
    torch.manual_seed(0)
    encoder, x = in_double(DMKEncoder(3, (8, 12, 16, 20)), training), torch.randn(2, 3, 33, 47).double()
    got = encoder(x)
    f = conv_norm_relu(encoder.stem, x, stride=2, padding=1)
    for block, feature in zip(encoder.blocks, got, strict=True):
        l_l = conv_norm_relu(block.local, f, stride=2, padding=1)  # eq. 1, k_s = 3
        total = l_l
        for m, conv in ((1, block.context.conv5), (2, block.context.conv7)):
            k = (m + 1) * 2 + 1
            assert conv.kernel_size == (k, k)
            # Depthwise: each channel by itself.
            z = [F.conv2d(l_l[:, [c]], conv.weight[[c]], conv.bias[[c]], padding=k // 2) for c in range(l_l.shape[1])]
            total = total + torch.cat(z, 1)
        f = conv_norm_relu(block.mix, total)  # eq. 2
        torch.testing.assert_close(feature, f)
    assert [f.shape[1:] for f in got] == [(8, 9, 12), (12, 5, 6), (16, 3, 3), (20, 2, 2)]


@pytest.mark.parametrize("training", [False, True])
def test_mixatt_decoder_equals_equations_7_to_10(training):
    """In training the same random state draws the same dropout and the same Monte Carlo cells on both sides."""
    torch.manual_seed(0)
    channels, dropout = (12, 16, 24, 64), 0.3
    decoder = in_double(MixAttDecoder(channels, dropout=dropout), training)
    sizes = (13, 18), (7, 9), (4, 5), (2, 3)  # odd ones: up-sampling goes to the size of the feature that it meets
    fused = [torch.randn(2, c, *size).double() for c, size in zip(channels, sizes, strict=True)]
    torch.manual_seed(1)
    got = decoder(fused)
    torch.manual_seed(1)
    p: Tensor | None = None
    decoded = []
    for block, num_heads, f in zip(decoder.blocks, (8, 6, 4, 2), reversed(fused), strict=True):
        x = f if p is None else torch.cat([F.interpolate(p, f.shape[2:], mode="bilinear"), f], 1)  # P_{l-1}, then F_l
        p1 = F.dropout(conv_norm_relu(block.entry[0], x, padding=1), dropout, training)  # eq. 7
        mixed = mixing_attention(block.attention, p1, num_heads)  # eq. 8 to 10
        p = F.conv2d(mixed, block.project.weight, block.project.bias, padding=1)  # eq. 10
        decoded.append(p)
    assert [p.shape[1] for p in decoded] == [32, 12, 8, 12], "all but the last halve their channels"
    assert len(got) == 3
    for feature, p in zip(got, reversed(decoded)):
        torch.testing.assert_close(feature, p)
