"""SNAC's layers around Snake with their own way back: the same parameters, state-dict keys and function, but
few passes over memory and little kept for the gradient: a residual unit keeps its input and one activation; a
Snake is computed again in the backward of the convolution behind it, which saves its output.

    replace_layers(model)       # in place, every layer of SNAC that has a faster one here
"""

import functools

import torch
import torch.nn.utils.parametrize as P
from snac.layers import DecoderBlock, EncoderBlock, ResidualUnit, Snake1d
from torch import nn
from torch.autograd.function import once_differentiable

from .kernels import MAX_DILATION, TAPS, ops

conv_back = torch.ops.aten.convolution_backward


def compute_dtype(x):
    """Of matrix products and what is stored between layers: autocast's, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def product(weight, x):
    """weight [D, C] times every item of x [B, C, T]. Not matmul: it copies x to make one product of all."""
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x)


class Snake(torch.autograd.Function):
    """x [B, C, T], alpha [1, C, 1] -> [B, C, T]; keeps x alone."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x, alpha)
        return ops.snake(x, alpha.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        of_x, of_alpha, _ = ops.snake_back(grad, x, alpha.flatten(), False)
        return of_x, of_alpha.sum(0).view_as(alpha)


class SnakeConv(torch.autograd.Function):
    """conv(snake(x)) for any convolution; keeps x alone. dtype: of the convolution and its result."""

    @staticmethod
    def forward(
        ctx, x, alpha, weight, bias, dtype, stride, padding, dilation, transposed, output_padding, groups
    ):
        ctx.conv = (stride, padding, dilation, transposed, output_padding, groups)
        w, ctx.weight_dtype = weight.to(dtype), weight.dtype
        ctx.save_for_backward(x, alpha, w)
        s = ops.snake(x.to(dtype), alpha.flatten())
        return torch.convolution(s, w, None if bias is None else bias.to(dtype), *ctx.conv)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, alpha, w = ctx.saved_tensors
        sizes = [w.shape[1 if ctx.conv[3] else 0]]
        wide, bias = x.to(grad.dtype), ctx.needs_input_grad[3]
        # the gradient of its input needs no input's values, only its shape
        of_s = conv_back(grad, wide, w, sizes, *ctx.conv, (True, False, False))[0]
        of_x, of_alpha, s = ops.snake_back(of_s, wide, alpha.flatten(), True)
        of_w, of_bias = conv_back(grad, s, w, sizes, *ctx.conv, (False, True, bias))[1:]
        of_w, of_bias = of_w.to(ctx.weight_dtype), of_bias.to(ctx.weight_dtype) if bias else None
        return of_x.to(x.dtype), of_alpha.sum(0).view_as(alpha), of_w, of_bias, *[None] * 7


class SnakeMix(torch.autograd.Function):
    """The last convolution, to one channel, of snake(x), in fp32 whatever dtype x has: it is the waveform,
    whose rounding is heard. Keeps x alone."""

    @staticmethod
    def forward(ctx, x, alpha, weight, bias):
        ctx.save_for_backward(x, alpha, weight)
        return ops.snake_mix(x, alpha.flatten(), weight[0], bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, alpha, weight = ctx.saved_tensors
        of_x, of_alpha, of_w, of_b, _ = ops.snake_conv_back(grad, None, x, alpha.flatten(), weight[0], 1)
        return of_x, of_alpha.sum(0).view_as(alpha), of_w.sum(0)[None], of_b.sum(0)


class Unit(torch.autograd.Function):
    """A residual unit: x + w1 snake(y) + b1 with y = depthwise convolution (w0 [C, 1, 7], b0) of snake(x).
    Keeps x and y."""

    @staticmethod
    def forward(ctx, x, alpha0, w0, b0, alpha1, w1, b1, dilation, dtype):
        x = x.to(dtype)
        y = ops.snake_conv(x, alpha0.flatten(), w0.flatten(1), b0, dilation)
        ctx.save_for_backward(x, y, alpha0, w0, alpha1, w1)
        ctx.dilation = dilation
        s, w = ops.snake(y, alpha1.flatten()), w1.to(dtype)[..., 0].expand(x.shape[0], -1, -1)
        return torch.add(x, b1.to(dtype)[:, None]).baddbmm_(w, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, alpha0, w0, alpha1, w1 = ctx.saved_tensors
        of_s = product(w1[..., 0].to(grad.dtype).T, grad)
        of_y, of_alpha1, s = ops.snake_back(of_s, y, alpha1.flatten(), True)
        of_w1 = torch.bmm(grad, s.transpose(1, 2)).sum(0, dtype=w1.dtype)
        del of_s, s
        of_x, of_alpha0, of_w0, of_b0, of_b1 = ops.snake_conv_back(
            of_y, grad, x, alpha0.flatten(), w0.flatten(1), ctx.dilation
        )
        of_alpha0, of_alpha1 = of_alpha0.sum(0).view_as(alpha0), of_alpha1.sum(0).view_as(alpha1)
        of_w0 = of_w0.sum(0).view_as(w0)
        of_b0, of_b1 = of_b0.sum(0), of_b1.sum(0)
        return of_x, of_alpha0, of_w0, of_b0, of_alpha1, of_w1[..., None], of_b1, None, None


class Noise(torch.autograd.Function):
    """x + n (w x): x [B, C, T], w [C, C, 1], noise n [B, 1, T] (no gradient). Keeps x alone."""

    @staticmethod
    def forward(ctx, x, weight, n, dtype):
        x, n = x.to(dtype), n.to(dtype)
        ctx.save_for_backward(x, weight, n)
        return torch.addcmul(x, n, product(weight[..., 0].to(dtype), x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, n = ctx.saved_tensors
        noisy = grad * n
        of_weight = torch.bmm(noisy, x.transpose(1, 2)).sum(0, dtype=weight.dtype)
        w = weight[..., 0].to(grad.dtype).T.expand(x.shape[0], -1, -1)
        return torch.baddbmm(grad, w, noisy), of_weight[..., None], None, None


def hooked(*layers) -> bool:
    """Whether somebody watches one of these: it then has to be called by itself."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in layers)


def snake_conv(snake, conv, x):
    """conv(snake(x)) of two of snac's layers."""
    if hooked(snake, conv):
        return conv(snake(x))
    weight = conv.weight
    last = weight.shape == (1, x.shape[1], TAPS) and conv.padding == (TAPS // 2,) and not conv.transposed
    if last and conv.stride == conv.dilation == (1,):
        return SnakeMix.apply(x, snake.alpha, weight, conv.bias)
    dtype = torch.promote_types(x.dtype, torch.float32) if conv.out_channels == 1 else compute_dtype(x)
    how = (conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups)
    return SnakeConv.apply(x, snake.alpha, weight, conv.bias, dtype, *how)


def run(layers, x):
    """The layers of a Sequential one after the other, a Snake and the convolution behind it as one."""
    layers, i = list(layers), 0
    while i < len(layers):
        behind = layers[i + 1] if i + 1 < len(layers) else None
        pair = isinstance(layers[i], Snake1d) and isinstance(behind, (nn.Conv1d, nn.ConvTranspose1d))
        x = snake_conv(layers[i], behind, x) if pair else layers[i](x)
        i += 1 + pair
    return x


def add_noise(x, noise, linear):
    """x + noise * linear(x) of snac's NoiseBlock: noise [B, 1, T]."""
    if hooked(linear):
        return x + noise * linear(x)
    return Noise.apply(x, linear.weight, noise, compute_dtype(x))


class OwnSnake1d(Snake1d):
    """Without snac's TorchScript function, whose executor changes kernels after the first calls, so that a
    resumed run differs from the unbroken one in the last bit."""

    def forward(self, x):
        return Snake.apply(x, self.alpha)


class OwnResidualUnit(ResidualUnit):
    def forward(self, x):
        snake0, conv0, snake1, conv1 = self.block
        if (
            hooked(*self.block)
            or conv0.groups == 1
            or conv0.kernel_size != (TAPS,)
            or conv0.dilation[0] > MAX_DILATION
        ):
            return x + run(self.block, x)
        return Unit.apply(
            x,
            snake0.alpha,
            conv0.weight,
            conv0.bias,
            snake1.alpha,
            conv1.weight,
            conv1.bias,
            conv0.dilation[0],
            compute_dtype(x),
        )


class OwnBlock:
    def forward(self, x):
        return run(self.block, x)


class OwnEncoderBlock(OwnBlock, EncoderBlock):
    pass


class OwnDecoderBlock(OwnBlock, DecoderBlock):
    pass


OWN = {
    Snake1d: OwnSnake1d,
    ResidualUnit: OwnResidualUnit,
    EncoderBlock: OwnEncoderBlock,
    DecoderBlock: OwnDecoderBlock,
}


def replace_layers(module):
    """`module` with this file's layers in the place of snac's: the same parameters and state-dict keys."""
    for m in module.modules():
        m.__class__ = OWN.get(type(m), type(m))
    return module


# ---- weight norm of what is frozen ----


def fold_frozen(module) -> None:
    """Compute the weight norm of frozen layers now, not at every call; of others again at every call.
    Parameters and state-dict keys stay. To be called when requires_grad or frozen weights have changed."""
    for m in module.modules():
        if not P.is_parametrized(m, "weight"):
            continue
        norm = m.parametrizations.weight
        norm.__dict__.pop("forward", None)
        if not any(p.requires_grad for p in norm.parameters()):
            with torch.no_grad():
                norm.forward = functools.partial(torch.Tensor.detach, norm())
