"""FIAS against its paper and design: ablations, Monte Carlo attention, fusion."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import FIAS
from networks.blocks import SumFusion
from networks.fias import ContextAwareFusion, MixingAttention, MonteCarloAttention


def test_ablations_run_together_and_unknown_ones_are_refused():
    net = FIAS(1, 2, local_encoder=False, fusion="add", decoder="conv").eval()
    assert net(torch.zeros(1, 1, 40, 40)).shape == (1, 2, 40, 40)
    with pytest.raises(ValueError, match="fusion is one of 'caf', 'add', got 'cat'"):
        FIAS(1, 2, fusion="cat")
    with pytest.raises(ValueError, match="decoder is one of 'mixatt', 'conv', got 'unet'"):
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


def test_mixing_attention_equals_equations_8_to_10():
    torch.manual_seed(0)
    block, x = MixingAttention(16, 4).double().eval(), torch.randn(2, 16, 5, 3).double()
    tokens = block.norm(x.flatten(2).transpose(1, 2))
    q, k, v = (
        t.reshape(2, 15, 4, 4).transpose(1, 2)
        for t in nn.functional.linear(tokens, block.self_attention.qkv.weight, block.self_attention.qkv.bias).chunk(
            3, -1
        )
    )
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    attended = block.self_attention.proj((weights @ v).transpose(1, 2).reshape(2, 15, 16))
    attended = attended.transpose(1, 2).reshape(2, 16, 5, 3)
    p2 = attended + x
    torch.testing.assert_close(block(x), p2 * block.monte_carlo(p2) + attended)
