"""DANIE against its paper: the equations, the ablations, the pretrained stream, sizes that the windows do not fit."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from networks import DANIE, DataError
from networks.danie import (
    ConcatFusion,
    EnhancingHierarchicalAttention,
    EnhancingSelfAttention,
    HierarchicalAttention,
    HierarchicalAttentionPerception,
    JointPreservation,
    SelfAttentionPerception,
)

TINY = "maxvit_rmlp_tiny_rw_256"


def small(in_channels: int = 1, out_channels: int = 4, **kwargs: object) -> DANIE:
    torch.manual_seed(0)
    return DANIE(in_channels, out_channels, **{"size": "small", "img_size": 64, **kwargs}).eval()


def image(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def weighted(attention: nn.Module, h: Tensor) -> Tensor:
    """Eq. 2 to 5 as printed, channel first, branch by branch."""
    refined = []
    for pool_pixels, pool_channels, conv in (
        (lambda t: t.flatten(2).max(2).values, lambda t: t.max(1, keepdim=True).values, "conv_max"),
        (lambda t: t.flatten(2).mean(2), lambda t: t.mean(1, keepdim=True), "conv_avg"),
    ):
        first, _, second = attention.attentions[0].mlp
        hidden = (pool_pixels(h) @ first.weight.flatten(1).T + first.bias).clamp(min=0)
        a_channel = torch.sigmoid(hidden @ second.weight.flatten(1).T + second.bias)
        m = a_channel[:, :, None, None] * h
        conv = getattr(attention.attentions[1], conv)
        a_spatial = torch.sigmoid(conv.weight * pool_channels(m) + conv.bias)
        refined.append(a_spatial * m)
    o_d = attention.w_max * refined[0] + attention.w_avg * refined[1]
    return torch.sigmoid((attention.compress.weight * o_d).sum(1, keepdim=True) + attention.compress.bias)


def test_hierarchical_attention_equals_equations_2_to_5():
    torch.manual_seed(0)
    attention, h = HierarchicalAttention(32).double(), torch.randn(2, 32, 5, 7).double()
    nn.init.constant_(attention.w_max, 0.7)
    a_d = attention(h)
    assert a_d.shape == (2, 1, 5, 7) and a_d.min() > 0 and a_d.max() < 1
    torch.testing.assert_close(a_d, weighted(attention, h))


def test_compiled_in_bfloat16_the_gradient_of_the_maxima_is_the_same():
    """To rounding; that of ``amax`` divides by the number of maxima that it finds again, which may then be none."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(1, 32, 3), nn.GELU(), HierarchicalAttention(32))
    x = torch.randn(2, 1, 12, 12)
    gradients = []
    for network in (block, torch.compile(block, fullgraph=True)):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            network(x).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in block.parameters()]))
    eager, compiled = gradients
    assert float((compiled - eager).norm() / eager.norm()) < 0.05


def test_spatial_first_and_single_attentions_are_what_they_say():
    torch.manual_seed(0)
    h = torch.randn(2, 32, 5, 7)
    spatial_first = HierarchicalAttention(32, ["spatial", "channel"])
    spatial, channel = spatial_first.attentions
    branches = channel(*spatial(h, h))
    o_d = spatial_first.w_max * branches[0] + spatial_first.w_avg * branches[1]
    torch.testing.assert_close(spatial_first(h), torch.sigmoid(spatial_first.compress(o_d)))
    alone = HierarchicalAttention(32, ["spatial"])
    a_max = torch.sigmoid(alone.attentions[0].conv_max(h.max(1, keepdim=True).values))
    a_avg = torch.sigmoid(alone.attentions[0].conv_avg(h.mean(1, keepdim=True)))
    torch.testing.assert_close(alone(h), torch.sigmoid(alone.compress(0.5 * a_max * h + 0.5 * a_avg * h)))


def test_calibration_starts_at_a_half_and_learns_unless_it_is_off():
    h = torch.randn(2, 32, 5, 7)
    for calibration in (True, False):
        attention = HierarchicalAttention(32, calibration=calibration)
        assert attention.w_max.item() == attention.w_avg.item() == 0.5
        attention(h).sum().backward()
        learns = [w.grad is not None and bool(w.grad.abs() > 0) for w in (attention.w_max, attention.w_avg)]
        assert learns == [calibration, calibration]


@pytest.mark.parametrize("scaled", [False, True])
def test_es_equals_danet_s_channel_attention(scaled):
    torch.manual_seed(0)
    es, s = EnhancingSelfAttention(scaled), torch.randn(2, 8, 3, 4)
    assert torch.equal(es(s), s), "lambda starts at 0"
    nn.init.constant_(es.scale, 0.3)
    flat = s.reshape(2, 8, 12)
    expected = torch.empty_like(flat)
    for b in range(2):
        for j in range(8):
            energies = torch.stack([flat[b, j] @ flat[b, i] for i in range(8)]) / (12**0.5 if scaled else 1)
            weights = energies.exp() / energies.exp().sum()
            expected[b, j] = 0.3 * sum(weights[i] * flat[b, i] for i in range(8)) + flat[b, j]
    torch.testing.assert_close(es(s), expected.reshape(s.shape), atol=1e-5, rtol=1e-4)
    es(s).sum().backward()
    assert es.scale.grad.abs() > 0
    larger = torch.randn(1, 8, 9, 11)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(es, s)(larger), es(larger), atol=1e-5, rtol=1e-4)


def test_es_keeps_its_energies_exact_under_autocast():
    torch.manual_seed(0)
    es, s = EnhancingSelfAttention(), 4 * torch.randn(1, 16, 64, 64).bfloat16()
    nn.init.ones_(es.scale)
    # Channels that differ little have energies of 6e4 that differ by less than half precision can tell.
    s[:, 8:] = s[:, :8] * 1.01
    expected = (s.double().flatten(2) @ s.double().flatten(2).transpose(1, 2)).softmax(2)
    expected = (expected @ s.double().flatten(2)).reshape(s.shape) + s
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(es), file)
    file.seek(0)
    for module in (es, torch.jit.load(file), torch.jit.trace(es, s.float())):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(s).double(), expected, atol=0.1, rtol=0.02)


def test_eh_equals_equations_8_and_9():
    torch.manual_seed(0)
    eh, h = EnhancingHierarchicalAttention(16).double(), torch.randn(2, 16, 5, 3).double()
    logits = (eh.context.weight * h).sum(1) + eh.context.bias
    weights = logits.flatten(1).exp() / logits.flatten(1).exp().sum(1, keepdim=True)
    a_g = torch.einsum("bcp,bp->bc", h.flatten(2), weights)
    first, norm, _, second, _ = eh.integration
    assert first.out_features == 4
    w_g = torch.sigmoid(second(F.gelu(F.layer_norm(first(a_g), (4,), norm.weight, norm.bias))))
    torch.testing.assert_close(eh(h), w_g[:, :, None, None] * h)


def test_joint_preservation_equals_equations_10_and_11():
    torch.manual_seed(0)
    channels = (16, 32)
    jp = JointPreservation(channels, "joint").double().eval()
    s = [torch.randn(2, 16, 8, 8).double(), torch.randn(2, 32, 4, 4).double()]
    h = [torch.randn_like(t) for t in s]
    nn.init.ones_(jp.fusion.scales[0].es.scale)
    e = [f.conv(f.es(a) + f.eh(b)) for f, a, b in zip(jp.fusion.scales, s, h, strict=True)]
    j2 = jp.blocks[0](e[1])
    up = F.interpolate(j2, scale_factor=2, mode="bilinear")
    j1 = jp.blocks[1](torch.cat([e[0], up], 1))
    got = jp([s, h])
    torch.testing.assert_close(got[0], j1)
    torch.testing.assert_close(got[1], j2)


def test_fusions_of_table_7_differ_by_what_they_leave_out():
    def fusion(name: str) -> nn.Module:
        return JointPreservation((16, 32, 64, 128), name).fusion.scales[0]

    s, h = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(fusion("add")([s, h]), s + h)
    assert isinstance(fusion("es").es, EnhancingSelfAttention) and isinstance(fusion("es").eh, nn.Identity)
    assert isinstance(fusion("eh").es, nn.Identity) and isinstance(fusion("eh").eh, EnhancingHierarchicalAttention)
    concat = ConcatFusion(16).eval()
    torch.testing.assert_close(concat([s, h]), concat.conv(torch.cat([s, h], 1)) + s + h)


def test_stages_keep_or_leave_convolutions_as_the_attention_says():
    def convolutions(attention: str) -> int:
        stage = HierarchicalAttentionPerception(1, (16, 32, 64, 128), attention, True).stages[1]
        return sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in stage.modules())

    assert {a: convolutions(a) for a in ("channel-spatial", "channel", "spatial", "w/o spatial", "w/o channel")} == {
        "channel-spatial": 3,
        "channel": 3,
        "spatial": 3,
        "w/o spatial": 1,
        "w/o channel": 2,
    }


@torch.no_grad()
def test_each_ablation_is_another_network_of_the_same_interface():
    x, seen = image(1, 1, 64, 64), []
    for kwargs in (
        {},
        {"sap": False},
        {"hap": False},
        *({"attention": a} for a in ("spatial-channel", "channel", "spatial", "w/o spatial", "w/o channel")),
        *({"fusion": f} for f in ("es", "eh", "add", "concat")),
    ):
        net = small(**kwargs)
        for module in net.modules():
            if isinstance(module, EnhancingSelfAttention):
                nn.init.ones_(module.scale)  # at its initial 0, ES changes nothing
        out = net(x)
        assert out.shape == (1, 4, 64, 64)
        assert not any(torch.equal(out, other) for other in seen), kwargs
        seen.append(out)


def test_unknown_arguments_are_refused_with_what_is_known():
    with pytest.raises(ValueError, match="size.*'small', 'large'.*'medium'"):
        DANIE(1, 2, size="medium")
    with pytest.raises(ValueError, match="attention.*'both'"):
        DANIE(1, 2, attention="both")
    with pytest.raises(ValueError, match="fusion.*'sum'"):
        DANIE(1, 2, fusion="sum")
    with pytest.raises(ValueError, match="img_size.* 0"):
        DANIE(1, 2, img_size=0)
    with pytest.raises(ValueError, match="both False"):
        DANIE(1, 2, sap=False, hap=False)
    with pytest.raises(TypeError, match="attentions"):
        DANIE(1, 2, attentions="both")


def test_former_names_of_arguments_are_taken_with_a_warning():
    with pytest.warns(FutureWarning, match="hap"):
        net = small(hierarchical_attention=False)
    assert net.hierarchical_attention is None and net.self_attention is not None


@torch.no_grad()
def test_a_slice_that_does_not_fit_is_padded_below_and_right_and_cropped_back():
    net, x = small(), image(2, 1, 70, 64)
    torch.testing.assert_close(net(x), net(F.pad(x, [0, 0, 0, 58]))[:, :, :70])
    windowless = small(sap=False)
    torch.testing.assert_close(windowless(x), windowless(F.pad(x, [0, 0, 0, 26]))[:, :, :70])


@torch.no_grad()
def test_every_img_size_takes_the_same_weights():
    state = small(img_size=64).state_dict()
    for img_size in (32, 96, (50, 96)):
        net = small(img_size=img_size)
        net.load_state_dict(state, strict=True)
        assert net(image(1, 1, 96, 96)).isfinite().all()


@pytest.fixture(scope="module")
def imagenet() -> dict[str, Tensor]:
    """A state dict as timm publishes it, with random weights."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    return timm.create_model(TINY, img_size=64).state_dict()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_timm_s_weights_loads_exactly(imagenet, tmp_path, suffix):
    import timm

    file = tmp_path / f"maxvit.{suffix}"
    save_file(imagenet, file) if suffix == "safetensors" else torch.save(imagenet, file)
    reference = timm.create_model(TINY, img_size=64).eval()
    reference.load_state_dict(imagenet)
    stream = SelfAttentionPerception(TINY, 3, (64, 64), pretrained=file).eval()
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference.forward_intermediates(x, intermediates_only=True, indices=[1, 2, 3, 4])
        for got, want in zip(stream(x), expected, strict=True):
            torch.testing.assert_close(got, want)
        gray = small(1, pretrained=file).self_attention(x[:, :1])
        for got, want in zip(gray, stream(x[:, :1].repeat(1, 3, 1, 1)), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_weights_of_another_network_are_refused_by_name(imagenet, tmp_path):
    torch.save({k: v for k, v in imagenet.items() if "stages.2" not in k}, tmp_path / "part.pth")
    with pytest.raises(DataError, match=r"part.pth.*missing.*stages_2"):
        small(pretrained=tmp_path / "part.pth")
    with pytest.raises(DataError, match=r"other.pth.*shape"):
        torch.save(imagenet, tmp_path / "other.pth")
        DANIE(1, 2, size="large", img_size=64, pretrained=tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="none.pth"):
        small(pretrained=tmp_path / "none.pth")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """timm's Hugging Face cache in an empty folder, without a connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_pretrained_true_takes_what_timm_downloaded(imagenet, hub):
    repository = hub / f"models--timm--{TINY}.sw_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    save_file(imagenet, repository / "snapshots" / ("a" * 40) / "model.safetensors")
    got = small(1, pretrained=True).self_attention.maxvit.state_dict()
    torch.testing.assert_close(got["stem.conv1.weight"], imagenet["stem.conv1.weight"].sum(1, keepdim=True))
    name = "stages.3.blocks.1.attn_grid.attn.qkv.weight"
    assert torch.equal(got[name.replace("stages.3", "stages_3")], imagenet[name])


def test_pretrained_true_without_a_connection_says_what_was_tried_and_what_to_do(hub):
    with pytest.raises(DataError, match=rf"timm/{TINY}.*{TINY}_sw-.*pretrained='path/to/file'.*pretrained=False"):
        small(pretrained=True)
