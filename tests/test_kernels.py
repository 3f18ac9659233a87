"""Snake and its neighbours as single passes: the formulas, whoever computes them, and their gradients."""

import copy
import functools

import pytest
import torch
from conftest import make_snac

from snac48 import kernels, layers
from snac48.cli import UserError

native = pytest.mark.skipif(kernels.native()[0] is None, reason=f"no native kernels: {kernels.native()[1]}")
B, C, T = 3, 5, 4500  # more than two tiles of kernels.cpp


@pytest.fixture
def plainly():
    kernels.use_plain()
    yield
    kernels.use_plain(False)


def inputs(dtype=torch.float32, t=T):
    g = torch.Generator().manual_seed(0)
    x, grad, skip = (torch.randn(B, C, t, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    alpha = torch.tensor([1e-9, 0.03, 0.7, 1.0, 3.0])
    return 3 * x, grad, skip, alpha, torch.randn(C, 7, generator=g), torch.randn(C, generator=g)


def everything(formulas, dtype, dilation=9, rounded=torch.float32):
    """Results of all five, as double. formulas: by name; rounded: dtype in which the inputs are exact."""
    x, grad, skip, alpha, weight, bias = inputs(rounded)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, grad, skip = (v.to(dtype) for v in (x, grad, skip))
    alpha, weight, bias = alpha.to(wide), weight.to(wide), bias.to(wide)
    out = {
        "snake": [formulas["snake"](x, alpha)],
        "snake_back": formulas["snake_back"](grad, x, alpha, True),
        "snake_conv": [formulas["snake_conv"](x, alpha, weight, bias, dilation)],
        "snake_mix": [formulas["snake_mix"](x, alpha, weight, bias[:1])],
        "snake_conv_back": formulas["snake_conv_back"](grad, skip, x, alpha, weight, dilation),
        "snake_mix_back": formulas["snake_conv_back"](grad[:, :1].to(wide), None, x, alpha, weight, 1),
    }
    return {name: [v.double() for v in values] for name, values in out.items()}


def of_kind(kind):
    names = ("snake", "snake_back", "snake_conv", "snake_mix", "snake_conv_back")
    return {name: getattr(kernels, f"{kind}_{name}") for name in names}


def compare(found, wanted, rtol):
    """Relative to the largest value of each row: a sum of 4,500 terms is as exact as its terms."""
    for name, values in wanted.items():
        for a, b in zip(found[name], values, strict=True):
            if not b.numel():
                continue
            scale = b.abs().amax(-1, keepdim=True).clamp(min=1) if b.dim() > 1 else 1
            assert ((a - b).abs() / scale).max() < rtol, name


@native
@pytest.mark.parametrize("dilation", [1, 3, 9])
def test_native_kernels_are_the_formulas_in_double(dilation):
    exact = everything(of_kind("plain"), torch.float64, dilation)
    found = everything(of_kind("native"), torch.float32, dilation)
    compare({"snake": found["snake"], "snake_conv": found["snake_conv"]},
            {"snake": exact["snake"], "snake_conv": exact["snake_conv"]}, 1e-6)  # fmt: skip
    compare(found, exact, 8e-6)  # sums of 4,500 terms, gradients at alpha x = 40


@native
def test_native_bf16_rounds_its_results_once():
    exact = everything(of_kind("plain"), torch.float64, rounded=torch.bfloat16)
    found = everything(of_kind("native"), torch.bfloat16, rounded=torch.bfloat16)
    assert torch.equal(found["snake"][0], exact["snake"][0].bfloat16().double())
    compare(found, exact, 2**-8)


@native
def test_results_do_not_depend_on_the_number_of_threads():
    once = everything(of_kind("native"), torch.float32)
    torch.set_num_threads(2)
    try:
        again = everything(of_kind("native"), torch.float32)
    finally:
        torch.set_num_threads(1)
    for name, values in once.items():
        assert all(torch.equal(a, b) for a, b in zip(values, again[name])), name


@native
def test_a_waveform_shorter_than_the_convolution_and_values_that_are_no_numbers():
    x, _, _, alpha, weight, bias = inputs(t=4)
    found = kernels.native_snake_conv(x, alpha, weight, bias, 9)
    assert torch.allclose(found, kernels.plain_snake_conv(x, alpha, weight, bias, 9), atol=1e-5)
    x[1, 2, 3] = float("nan")
    assert kernels.native_snake(x, alpha).isnan().sum() == 1
    assert kernels.native_snake(x.bfloat16(), alpha).isnan().sum() == 1


def test_what_a_gpu_compiles_is_the_same_formula(monkeypatch):
    """The functions that become Triton kernels, as graphs of any shape; code is made of one of them."""
    graph = functools.cache(lambda f: torch.compile(f, dynamic=True, fullgraph=True, backend="aot_eager"))
    exact = everything(of_kind("plain"), torch.float64, 3)
    if kernels.native()[0]:  # else there is no compiler for torch.compile either
        x, _, _, alpha, *_ = inputs()
        compare({"snake": [kernels.compiled_snake(x, alpha)]}, {"snake": exact["snake"]}, 1e-6)
    monkeypatch.setattr(kernels, "compiled", graph)
    compare(everything(of_kind("compiled"), torch.float32, 3), exact, 8e-6)
    found = everything(of_kind("compiled"), torch.bfloat16, 3, rounded=torch.bfloat16)
    compare(found, everything(of_kind("plain"), torch.float64, 3, rounded=torch.bfloat16), 2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_what_torch_compile_expects_of_them(dtype):
    """Shapes, strides and dtypes of every result are those of the formula on fake tensors."""
    x, grad, skip, alpha, weight, bias = inputs(dtype, 61)  # no multiple of the dilation
    check = functools.partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    for again in (False, True):
        check(kernels.ops.snake_back.default, (grad, x, alpha, again))
    check(kernels.ops.snake.default, (x, alpha))
    check(kernels.ops.snake_conv.default, (x, alpha, weight, bias, 3))
    check(kernels.ops.snake_mix.default, (x, alpha, weight, bias[:1]))
    for g, past in ((grad, skip), (grad, None), (grad[:, :1].float(), None)):
        check(kernels.ops.snake_conv_back.default, (g, past, x, alpha, weight, 3))


def test_the_operators_choose_and_say_what_they_chose(plainly):
    assert kernels.prepare("cpu") == "plain formulas (asked for)"
    x, _, _, alpha, *_ = inputs()
    assert torch.equal(kernels.ops.snake(x, alpha), kernels.plain_snake(x, alpha))
    kernels.use_plain(False)
    library, told = kernels.native()
    assert kernels.prepare("cpu") == (f"native kernels ({told})" if library else f"plain formulas ({told})")
    if library:
        assert torch.equal(kernels.ops.snake(x, alpha), kernels.native_snake(x, alpha))


@native
def test_kernels_that_fail_or_are_wrong_end_a_run_with_a_sentence(monkeypatch):
    kernels.prove(torch.device("cpu"))
    wrong = lambda name, x, *more, **sizes: kernels.address(x)
    monkeypatch.setattr(kernels, "call", wrong)  # results stay as memory was
    with pytest.raises(UserError, match=r"kernel snake\w* is wrong on cpu .*--plain"):
        kernels.prepare("cpu")

    def broken(*arguments, **sizes):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(kernels, "call", broken)
    with pytest.raises(UserError, match=r"snake fails on cpu \(RuntimeError: no such instruction\): --plain"):
        kernels.prepare("cpu")


def test_without_a_compiler_the_formulas_compute_and_it_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    kernels.native.cache_clear()
    try:
        assert kernels.prepare("cpu") == "plain formulas (no C++ compiler)"
        x, _, _, alpha, *_ = inputs()
        assert torch.equal(kernels.ops.snake(x, alpha), kernels.plain_snake(x, alpha))
    finally:
        kernels.native.cache_clear()


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_whole_computes_the_same(dtype):
    model = layers.replace_layers(make_snac(noise=False)).decoder
    x = torch.randn(1, next(model.parameters()).shape[0], 8)
    wanted = model(x)
    found = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert (found.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


# ---- layers ----


def gradients(model, x):
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def worst(exact, found):
    """Largest error, as a share of the largest value."""
    return max((a - b).abs().max() for a, b in zip(found, exact, strict=True)) / max(
        g.abs().max() for g in exact
    )


@pytest.mark.parametrize("depthwise", [True, False])
def test_replaced_layers_give_what_snac_gives(depthwise):
    """Output and every gradient of decoder and encoder: equal in double, in float as exact as snac's own."""
    model = make_snac(noise=False, depthwise=depthwise).train().requires_grad_(True)
    for module, x in (
        (model.decoder, torch.randn(2, model.latent_dim, 12)),
        (model.encoder, torch.randn(2, 1, 4096)),
    ):
        stock, exact = (
            gradients(copy.deepcopy(module), x),
            gradients(copy.deepcopy(module).double(), x.double()),
        )
        own = layers.replace_layers(module)
        assert {type(m).__name__ for m in own.modules()} >= {"OwnSnake1d", "OwnResidualUnit"}
        found, same = gradients(copy.deepcopy(own), x), gradients(own.double(), x.double())
        error = functools.partial(worst, exact)
        assert error(same) < 1e-12 and error(found) < 1.5 * error(stock) + 1e-6
        assert (found[0] - exact[0]).abs().max() < 2e-6


def test_noise_is_that_of_snac_with_its_gradients():
    linear = torch.nn.Conv1d(6, 6, 1, bias=False).double()
    x, n = torch.randn(2, 6, 50, dtype=torch.float64, requires_grad=True), torch.randn(2, 1, 50).double()
    assert torch.autograd.gradcheck(
        lambda x, w: layers.Noise.apply(x, w, n, torch.float64), (x, linear.weight)
    )
    assert torch.allclose(layers.add_noise(x, n, linear), x + n * linear(x))


def test_gradients_of_the_fused_layers_by_finite_differences():
    f = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    alpha = lambda: (torch.rand(1, 3, 1, dtype=torch.float64) + 0.3).requires_grad_()
    x = f(2, 3, 20)
    unit = lambda *a: layers.Unit.apply(*a, 2, torch.float64)
    assert torch.autograd.gradcheck(unit, (x, alpha(), f(3, 1, 7), f(3), alpha(), f(3, 3, 1), f(3)))
    assert torch.autograd.gradcheck(layers.SnakeMix.apply, (x, alpha(), f(1, 3, 7), f(1)))
    up = lambda *a: layers.SnakeConv.apply(*a, torch.float64, (2,), (1,), (1,), True, (0,), 1)
    assert torch.autograd.gradcheck(up, (x, alpha(), f(3, 4, 4), f(4)))


def test_little_is_kept_for_the_gradient():
    """A residual unit keeps its input and one activation of that size, in the dtype of the computation."""
    model = layers.replace_layers(make_snac(noise=False)).requires_grad_(True)
    unit = next(m for m in model.decoder.modules() if isinstance(m, layers.OwnResidualUnit))
    channels, kept = unit.block[0].alpha.shape[1], {}
    note = lambda t: kept.update({t.untyped_storage().data_ptr(): t.nbytes}) or t
    for dtype in (torch.float32, torch.bfloat16):
        kept.clear()
        x = torch.randn(1, channels, 9000).to(dtype)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            assert unit(x).dtype == dtype
        assert sum(n for n in kept.values() if n >= x.nbytes) == 2 * x.nbytes


def test_a_watched_layer_is_called_by_itself():
    """A forward hook sees its layer's output, as in snac."""
    model, seen = layers.replace_layers(make_snac(noise=False)), []
    for m in model.decoder.modules():
        if isinstance(m, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            m.register_forward_hook(lambda *a: seen.append(1))
    model.decoder(torch.randn(1, model.latent_dim, 4))
    assert len(seen) == sum(
        isinstance(m, torch.nn.Conv1d | torch.nn.ConvTranspose1d) for m in model.decoder.modules()
    )


def test_weight_norm_of_frozen_layers_is_computed_once():
    model = layers.replace_layers(make_snac(noise=False)).decoder
    x, keys = torch.randn(1, next(model.parameters()).shape[0], 8), list(model.state_dict())
    wanted, calls = model(x), []
    layers.fold_frozen(model)
    for name, frozen in (("frozen", True), ("trained", False)):
        model.requires_grad_(not frozen)
        layers.fold_frozen(model)
        with torch.profiler.profile() as profile:
            assert torch.equal(model(x), wanted), name
        calls.append(sum("weight_norm_interface" in event.key for event in profile.key_averages()))
    assert calls[0] == 0 < calls[1] and list(model.state_dict()) == keys
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
