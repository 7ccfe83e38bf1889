"""What every network of the package promises: one suite, parametrised over the networks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import run
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from networks import DANIE, FIAS, DataError, load_exported, load_torchscript, save_exported

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "FIAS": FIAS,
    "DANIE-S": partial(DANIE, size="small", img_size=64),
    "DANIE-L": partial(DANIE, size="large", img_size=64),
}
SIZES = [(32, 32), (33, 47), (100, 75), (250, 199), (224, 224)]


# Network, constructor's arguments, parameters in millions, multiply-accumulates in G at 256 x 256: FIAS's are its
# design's, DANIE's costs those printed in tables 1, 5 and 7 (the parameters are measured: the paper prints none).
COST = {
    "FIAS": (FIAS, {}, 32.54, 9.94),
    "FIAS without DMK": (FIAS, {"local_encoder": False}, 26.94, 9.21),
    "FIAS sum fusion": (FIAS, {"fusion": "add"}, 28.12, 9.60),
    "FIAS without MixAtt": (FIAS, {"decoder": "conv"}, 30.54, 6.84),
    "DANIE-S": (DANIE, {"size": "small"}, 50.02, 13.29),
    "DANIE-L": (DANIE, {}, 112.11, 26.55),
    "A.1 w/o hierarchical-attention": (DANIE, {"hap": False}, 81.73, 19.06),
    "A.2 w/o self-attention": (DANIE, {"sap": False}, 40.53, 10.98),
    "A.3 w/o spatial att": (DANIE, {"fusion": "add", "attention": "w/o spatial"}, 90.55, 22.13),
    "A.4 w/o channel att": (DANIE, {"fusion": "add", "attention": "w/o channel"}, 97.51, 23.25),
    "A.5, C.2 add": (DANIE, {"fusion": "add"}, 104.66, 25.16),
    "C.1 concat + residual": (DANIE, {"fusion": "concat"}, 118.76, 27.88),
    "C.3 EH + add": (DANIE, {"fusion": "eh"}, 112.11, 26.53),
    "C.4 ES + add": (DANIE, {"fusion": "es"}, 111.71, 26.52),
}


@pytest.mark.parametrize("variant", COST)
def test_cost_is_the_printed_one_within_two_percent(variant, capsys):
    network, kwargs, parameters, macs = COST[variant]
    net = network(in_channels=1, out_channels=9, **kwargs).eval()
    # Not every torch version's counter knows the fused attention kernel of the CPU: the plain one is counted by all.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(torch.zeros(1, 1, 256, 256))
    got = sum(p.numel() for p in net.parameters()) / 1e6, counter.get_total_flops() / 2e9
    with capsys.disabled():
        print(
            f"\n{variant:31} {got[0]:7.2f} M   {got[1]:6.2f} G, printed {macs:5.2f} ({got[1] / macs - 1:+.1%})", end=""
        )
    assert got == (pytest.approx(parameters, rel=0.001), pytest.approx(macs, rel=0.02))


@pytest.fixture(params=NETWORKS, scope="module")
def build(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    """Constructor of each network, seeded, with batch statistics that differ from their initial values."""

    def build(in_channels: int = 1, out_channels: int = 4, **kwargs: object) -> nn.Module:
        torch.manual_seed(0)
        net = NETWORKS[request.param](in_channels, out_channels, **kwargs)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        return net

    return build


# DANIE-L is DANIE-S with other widths: what takes long is done with it where time is no matter.
long = pytest.mark.parametrize(
    "build", [*list(NETWORKS)[:-1], pytest.param("DANIE-L", marks=pytest.mark.slow)], indirect=True, scope="module"
)


def image(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_gives_logits_of_that_size(build, size, channels):
    out = build(channels, 5).eval()(image(1, channels, *size))
    assert out.shape == (1, 5, *size)
    assert out.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("size", [(256, 256), (512, 512)])
def test_large_sizes(build, size):
    assert build().eval()(image(2, 1, *size)).shape == (2, 4, *size)


def test_evaluation_is_deterministic_and_independent_of_the_batch(build):
    net = build().eval()
    x = image(3, 1, 64, 64)
    with torch.no_grad():
        out = net(x)
        assert torch.equal(out, net(x))
        torch.testing.assert_close(out[1:2], net(x[1:2]), atol=1e-5, rtol=1e-4)


def test_training_returns_maps_and_evaluation_their_sum(build):
    net = build(dropout=0.0, drop_path=0.0, deep_supervision=True).train()
    maps = net(image(2, 1, 64, 64))
    assert isinstance(maps, list) and all(m.shape == (2, 4, 64, 64) for m in maps)
    assert isinstance(build(deep_supervision=False).train()(image(2, 1, 64, 64)), Tensor)
    net.eval()
    x = image(2, 1, 64, 64)
    features: list[Tensor] = []
    hooks = [head.register_forward_hook(lambda _m, _i, out: features.append(out)) for head in net.heads.convs]
    with torch.no_grad():
        out = net(x)
    for hook in hooks:
        hook.remove()
    total = sum(nn.functional.interpolate(f, size=(64, 64), mode="bilinear") for f in features)
    torch.testing.assert_close(out, total)


def test_every_parameter_learns_and_nothing_is_nan(build):
    net = build(drop_path=0.0, deep_supervision=True).train()
    torch.manual_seed(0)
    sum((m * image(*m.shape)).mean() for m in net(image(2, 1, 96, 64))).backward()
    for name, parameter in net.named_parameters():
        if name.endswith(("rel_pos.mlp.fc2.bias", "eh.context.bias")):
            continue  # the same number on every logit of a softmax, which cancels it: its gradient is rounding
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (2, 1, 32, 32), (2, 1, 33, 47)])
def test_small_batches_and_sizes_train(build, shape):
    maps = build(deep_supervision=True).train()(image(*shape))
    assert all(m.shape[2:] == shape[2:] and m.isfinite().all() for m in maps)


@pytest.mark.parametrize("net", [FIAS(1, 4), DANIE(1, 4, sap=False)])
def test_one_value_per_channel_is_answered_with_what_to_do(net):
    with pytest.raises(ValueError, match="single slice.*32 x 32"):
        net.train()(torch.zeros(1, 1, 32, 32))
    assert net.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 4, 32, 32)


def test_wrong_inputs_are_answered_with_what_was_expected(build):
    net = build(1, 4).eval()
    with pytest.raises(ValueError, match=r"B, 1, H, W.*\[1, 64, 64\]"):
        net(torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="in_channels=1.*3 channels"):
        net(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="32 x 32.*31 x 64"):
        net(torch.zeros(1, 1, 31, 64))
    with pytest.raises(ValueError, match="spatial_dims=2.*3"):
        build(spatial_dims=3)


def test_state_dict_round_trip_is_strict(build):
    a, b = build().eval(), build().eval()
    for parameter in b.parameters():
        nn.init.zeros_(parameter)
    b.load_state_dict(a.state_dict(), strict=True)
    x = image(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


def test_half_precision_under_autocast(build):
    net = build(deep_supervision=True).eval()
    x = image(1, 1, 64, 64)
    with torch.no_grad():
        full = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x)
    assert half.isfinite().all()
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max() + 0.05
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(m.float().square().mean() for m in net(image(2, 1, 64, 64)))
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_channels_last_gives_the_same(build):
    net, x = build().eval(), image(2, 1, 64, 64)
    with torch.no_grad():
        plain = net(x)
        last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, atol=1e-4, rtol=1e-4)


def test_a_network_alone_waits_for_torch_and_no_more():
    heavy = ["monai", "ignite", "itk", "tensorboard", "matplotlib", "PIL", "timm", "nibabel", "pydicom"]
    script = f"import sys; from networks import DANIE, FIAS; print([m for m in {heavy} if m in sys.modules])"
    assert run("-c", script).stdout.strip() == "[]"


def test_script_saves_loads_and_equals(build):
    net, x = build(deep_supervision=True).eval(), image(2, 1, 64, 96)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), net(x), atol=1e-5, rtol=1e-5)
        with pytest.raises(Exception, match="3 channels"):
            scripted(image(1, 3, 64, 64))
    assert len(scripted.train()(x)) > 1


@long
def test_an_exported_program_equals_for_every_batch_and_in_bfloat16(build, tmp_path):
    net, file = build(deep_supervision=True).train(), tmp_path / "model.pt2"
    save_exported(net, file, (1, 64, 96))
    assert net.training
    net.eval()
    exported = load_exported(file).train()
    for size in (1, 3):
        x = image(size, 1, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), net(x), atol=1e-5, rtol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(exported(x), net(x), atol=2e-2, rtol=2e-2)
    with pytest.raises(DataError, match="model.pt2.*1 x 64 x 96.*1 x 96 x 64"):
        exported(image(1, 1, 96, 64))


@pytest.mark.parametrize(("name", "load"), [("model.ts", load_torchscript), ("model.pt2", load_exported)])
def test_a_file_that_is_no_exported_network_is_refused_by_name(name, load, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name}.*export"):
        load(tmp_path / name)
    (tmp_path / name).write_bytes(b"no network")
    with pytest.raises(DataError, match=f"{name}.*Export it again"):
        load(tmp_path / name)


def test_trace_equals(build):
    net, x = build().eval(), image(1, 1, 64, 64)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(net, x)
        torch.testing.assert_close(traced(x), net(x), atol=1e-5, rtol=1e-5)


@long
def test_onnx_equals_in_onnxruntime(build, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = build().eval(), image(2, 1, 64, 64)
    file = tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), net(x), atol=1e-4, rtol=1e-3)


@long
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(build, backend, training):
    torch._dynamo.reset()
    net = build(dropout=0.0, drop_path=0.0, deep_supervision=True).train(training)
    x = image(2, 1, 64, 64)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), atol=1e-4, rtol=1e-3)
        return
    sum(m.square().mean() for m in compiled(x)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
