"""Snake and the depthwise convolution behind it as single passes over memory: kernels.cpp on a CPU with a
compiler, Triton (made by torch.compile from the plain formulas) on a GPU, else the plain formulas.

    kernels.prepare("cpu")      # "native (g++)": builds or loads what is there; "plain (no c++ compiler)"
    y = kernels.ops.snake(x, alpha)

x: [B, C, T] float32 or bfloat16, parameters float32 [C]. Arithmetic is float32 at least, results have x's
dtype. Nothing here differentiates: layers.py does.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from .cli import UserError, first_line

TAPS, MAX_DILATION = 7, 9  # what kernels.cpp is made for
SOURCE = Path(__file__).with_name("kernels.cpp")
BUILD = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

# ---- the formulas ----


def widened(x):
    """x in the dtype of the arithmetic."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def parts(x, alpha):
    """x and alpha [C, 1] in the dtype of the arithmetic, 1 / alpha as SNAC takes it."""
    wide = widened(x)
    alpha = alpha.to(wide.dtype)[:, None]
    return wide, alpha, (alpha + 1e-9).reciprocal()


def plain_snake(x, alpha):
    """x + sin(alpha x)² / alpha (Ziyin et al. 2020)."""
    wide, alpha, inverse = parts(x, alpha)
    return (alpha * wide).sin_().square_().mul_(inverse).add_(wide).to(x.dtype)


def plain_snake_back(grad, x, alpha, again: bool):
    """(gradient of x, of alpha for each item [B, C], and snake(x) once more where `again`, else empty)."""
    wide, alpha, inverse = parts(x, alpha)
    # sin² as it stands: (1 - cos) / 2 is 0 in fp32 for small alpha, where `interpolate` starts
    square, slope = torch.sin(alpha * wide).square(), torch.sin(2 * alpha * wide)
    g = grad.to(wide.dtype)
    of_x = (g * (1 + alpha * inverse * slope)).to(x.dtype)
    of_alpha = (g * (inverse * (wide * slope - inverse * square))).sum(-1)
    return of_x, of_alpha, (wide + inverse * square).to(x.dtype) if again else x.new_empty(0)


def as_columns(x, dilation: int):
    """x [B, C, T] as [B, C, T / dilation, dilation], zeros behind its end: dilated taps lie one row apart
    there, and an undilated convolution of columns is several times faster on a CPU."""
    x = F.pad(x, (0, -x.shape[-1] % dilation))
    return x.view(*x.shape[:2], -1, dilation)


def plain_snake_conv(x, alpha, weight, bias, dilation: int):
    """Depthwise convolution (weight [C, 7], zero padding, as long as its input) of snake(x)."""
    wide = widened(x)
    s, weight = as_columns(plain_snake(wide, alpha), dilation), weight.to(wide.dtype)[:, None, :, None]
    y = F.conv2d(s, weight, bias.to(wide.dtype), padding=(TAPS // 2, 0), groups=x.shape[1])
    return y.flatten(2)[..., : x.shape[-1]].to(x.dtype).contiguous()


def plain_snake_mix(x, alpha, weight, bias):
    """Convolution to one channel (weight [C, 7], bias [1], zero padding) of snake(x): [B, 1, T], fp32 at
    least."""
    wide = widened(x)
    weight, bias = weight.to(wide.dtype)[None], bias.to(wide.dtype)
    return F.conv1d(plain_snake(wide, alpha), weight, bias, padding=TAPS // 2)


def plain_snake_conv_back(grad, skip, x, alpha, weight, dilation: int):
    """The way back of either. grad: [B, C, T] or, of snake_mix, [B, 1, T]. Gradients of x (plus `skip`, one
    that goes past the two), and, each for every item, of alpha [B, C], weight [B, C, 7] and bias [B, C or 1];
    the sums of `skip` [B, C], empty without one."""
    (b, c, n), wide = x.shape, widened(x)
    g = grad.to(wide.dtype)
    # items as groups: every item's own gradient of the weights
    each = lambda v: as_columns(v.expand(b, c, n), dilation).flatten(0, 1)[None]
    taps = weight.to(wide.dtype).repeat(b, 1)[:, None, :, None]
    how = (None, (1, 1), (TAPS // 2, 0), (1, 1), False, (0, 0), b * c, (True, True, False))
    of_s, of_weight, _ = torch.ops.aten.convolution_backward(
        each(g), each(plain_snake(wide, alpha)), taps, *how
    )
    of_s = of_s.view(b, c, -1)[..., :n].contiguous()
    of_x, of_alpha, _ = plain_snake_back(of_s, wide, alpha, False)
    if skip is not None:
        of_x = of_x + skip
    return of_x.to(x.dtype), of_alpha, of_weight.view(b, c, TAPS), g.sum(-1), sums_of(skip, x)


def sums_of(skip, x):
    return x.new_empty(0) if skip is None else skip.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))


# ---- the native kernels ----


@functools.cache
def native() -> tuple[ctypes.CDLL | None, str]:
    """(the library built of kernels.cpp by this machine's compiler, or None; which, or why not). It is kept
    in the user's cache folder; processes that build it at once each write a whole one."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        return None, "no C++ compiler"
    code = SOURCE.read_bytes()
    with contextlib.suppress(OSError):  # the same home on machines of different instruction sets
        code += Path("/proc/cpuinfo").read_bytes().partition(b"flags")[2].partition(b"\n")[0]
    name = f"kernels-{hashlib.sha256(code + repr((compiler, BUILD)).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snac48"
    if not (folder / name).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / name
                command = [compiler, *BUILD, "-fopenmp", "-o", str(built), str(SOURCE)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                if done.returncode:
                    return None, f"{compiler} fails: {(done.stderr.splitlines() or ['?'])[0][:120]}"
                os.replace(built, folder / name)
        except (OSError, subprocess.SubprocessError) as e:
            return None, f"it can't be built in {folder}: {e}"
    try:
        return ctypes.CDLL(str(folder / name)), Path(compiler).name
    except OSError as e:
        return None, f"{folder / name} can't be loaded: {e}"


def address(x):
    """Of a contiguous tensor, or null."""
    assert x is None or x.is_contiguous()
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def fp32(*parameters):
    """As kernels.cpp takes alpha, weight and bias, whatever dtype the model was cast to."""
    return [p.to(torch.float32).contiguous() for p in parameters]


def call(name: str, *arguments, rows, sizes=()) -> None:
    """A function of kernels.cpp over the rows of `rows` [B, C, T], whose dtype it has; tensors are passed by
    address, integers as int64."""
    b, c, n = rows.shape
    made = [
        ctypes.c_int64(a) if isinstance(a, int) else address(a) for a in (*arguments, b * c, c, n, *sizes)
    ]
    getattr(native()[0], f"{name}_{str(rows.dtype)[6:]}")(*made)


def native_snake(x, alpha):
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    call("snake", x, *fp32(alpha), y, rows=x)
    return y


def native_snake_back(grad, x, alpha, again: bool):
    grad, x = grad.contiguous(), x.contiguous()
    of_x, of_alpha = torch.empty_like(x), torch.empty(x.shape[:2])
    s = torch.empty_like(x) if again else None
    call("snake_back", grad, x, *fp32(alpha), of_x, of_alpha, s, rows=x)
    return of_x, of_alpha, x.new_empty(0) if s is None else s


def native_snake_conv(x, alpha, weight, bias, dilation: int):
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    call("snake_conv", x, *fp32(alpha, weight, bias), y, rows=x, sizes=(dilation,))
    return y


def native_snake_mix(x, alpha, weight, bias):
    x, y = x.contiguous(), x.new_empty(len(x), 1, x.shape[-1], dtype=torch.float32)
    call("snake_mix", x, *fp32(alpha, weight, bias), y, rows=x)
    return y


def native_snake_conv_back(grad, skip, x, alpha, weight, dilation: int):
    shared = grad.shape[1] != x.shape[1]
    grad, x = grad.to(torch.float32 if shared else x.dtype).contiguous(), x.contiguous()
    skip = None if skip is None else skip.contiguous()
    of_x, sums = torch.empty_like(x), [torch.empty(*x.shape[:2], *size) for size in ((), (TAPS,), (), ())]
    arguments, sizes = (grad, skip, x, *fp32(alpha, weight), of_x, *sums), (dilation, int(shared))
    call("snake_conv_back", *arguments, rows=x, sizes=sizes)
    of_alpha, of_weight, of_bias, of_skip = sums
    return (
        of_x,
        of_alpha,
        of_weight,
        of_bias[:, : grad.shape[1]].contiguous(),
        x.new_empty(0) if skip is None else of_skip,
    )


# ---- on a GPU: the same formulas, made into Triton kernels ----


def allow_recompiles() -> None:
    """A graph for every segment length, phase, dtype and dilation: more than the 8 of torch.compile."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


@functools.cache
def compiled(formula):
    """`formula` as one kernel for all shapes (a graph for each dtype, dilation and set of arguments)."""
    allow_recompiles()
    return torch.compile(formula, dynamic=True, fullgraph=True)


def shifts(x, dilation: int):
    """The views of x [B, C, T], zero outside, that the taps of the convolution see."""
    reach, n = TAPS // 2 * dilation, x.shape[-1]
    padded = F.pad(x, (reach, reach))
    return [padded[..., k * dilation : k * dilation + n] for k in range(TAPS)]


def conv_of(s, weight, bias, dilation: int):
    """Depthwise convolution as shifted multiply-adds, which fuse."""
    taps = zip(weight.unbind(1), shifts(s, dilation))
    return sum((w[:, None] * v.to(w.dtype) for w, v in taps), bias[:, None]).to(s.dtype)


def conv_back_of(grad, skip, x, alpha, weight, dilation: int):
    flipped = zip(weight.flip(1).unbind(1), shifts(grad, dilation))
    of_s = sum(w[:, None] * v.to(w.dtype) for w, v in flipped)
    of_x, of_alpha, _ = plain_snake_back(of_s, x, alpha, False)
    return of_x if skip is None else of_x + skip, of_alpha


def weight_back_of(grad, s, dilation: int):
    grad = grad.float()
    return torch.stack([(grad * v).sum(-1) for v in shifts(s, dilation)], -1), grad.sum(-1)


def compiled_snake(x, alpha):
    return compiled(plain_snake)(x, alpha)


def compiled_snake_back(grad, x, alpha, again: bool):
    return compiled(plain_snake_back)(grad, x, alpha, again)


def compiled_snake_conv(x, alpha, weight, bias, dilation: int):
    # two kernels: in one, each of the taps would take its own sine
    return compiled(conv_of)(compiled_snake(x, alpha), weight, bias, dilation)


def mix_of(s, weight, bias):
    taps = zip(weight.unbind(1), shifts(s, 1))
    return sum(w[:, None] * v for w, v in taps).sum(1, keepdim=True) + bias


def compiled_snake_mix(x, alpha, weight, bias):
    return compiled(mix_of)(compiled_snake(x.float(), alpha), weight, bias)


def compiled_snake_conv_back(grad, skip, x, alpha, weight, dilation: int):
    of_weight, of_bias = compiled(weight_back_of)(grad, compiled_snake(x, alpha), dilation)
    of_x, of_alpha = compiled(conv_back_of)(grad, skip, x, alpha, weight, dilation)
    return of_x, of_alpha, of_weight, of_bias, sums_of(skip, x)


# ---- one of them ----

FORMULAS = {
    "snake(Tensor x, Tensor alpha) -> Tensor": (plain_snake, native_snake, compiled_snake),
    "snake_back(Tensor grad, Tensor x, Tensor alpha, bool again) -> (Tensor, Tensor, Tensor)":
        (plain_snake_back, native_snake_back, compiled_snake_back),
    "snake_conv(Tensor x, Tensor alpha, Tensor weight, Tensor bias, int dilation) -> Tensor":
        (plain_snake_conv, native_snake_conv, compiled_snake_conv),
    "snake_mix(Tensor x, Tensor alpha, Tensor weight, Tensor bias) -> Tensor":
        (plain_snake_mix, native_snake_mix, compiled_snake_mix),
    "snake_conv_back(Tensor grad, Tensor? skip, Tensor x, Tensor alpha, Tensor weight, int dilation)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)":
        (plain_snake_conv_back, native_snake_conv_back, compiled_snake_conv_back),
}  # fmt: skip
LIBRARY = torch.library.Library(
    "snac48", "DEF"
)  # operators: profilers see them, torch.compile leaves them whole
ONLY_PLAIN = False


def use_plain(only: bool = True) -> None:
    """From now on the plain formulas alone, or again what is best."""
    global ONLY_PLAIN
    ONLY_PLAIN = only


def prepare(device: str) -> str:
    """What computes on this kind of device (cpu, cuda), with the reason; builds what has to be built."""
    if ONLY_PLAIN:
        return "plain formulas (asked for)"
    if device == "cuda":
        if not has_triton():
            return "plain formulas (no Triton in this Python)"
        prove(torch.device("cuda"))
        return "Triton kernels"
    library, told = native() if device == "cpu" else (None, "no kernels for it")
    if not library:
        return f"plain formulas ({told})"
    prove(torch.device("cpu"))
    return f"native kernels ({told})"


def prove(device: torch.device) -> None:
    """Compute every kernel once beside its formula. Raises UserError where that fails or differs: a compiler
    or a driver is broken in a way that nobody would see in a falling loss."""
    g = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        x, grad = (torch.randn(2, 3, 300, generator=g).to(device, dtype) for _ in range(2))
        alpha, weight = (0.1 + torch.rand(*size, generator=g).to(device) for size in ((3,), (3, 7)))
        for name, arguments in (("snake", (x, alpha)), ("snake_back", (grad, x, alpha, True)),
                                ("snake_conv", (x, alpha, weight, alpha, 3)),
                                ("snake_mix", (x, alpha, weight, alpha[:1])),
                                ("snake_conv_back", (grad, grad, x, alpha, weight, 3))):  # fmt: skip
            try:
                found, wanted = getattr(ops, name)(*arguments), globals()[f"plain_{name}"](*arguments)
                as_list = lambda v: [v] if torch.is_tensor(v) else v
                worst = max(
                    float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1))
                    for a, b in zip(as_list(found), as_list(wanted), strict=True)
                )
            except Exception as e:  # of Triton, the driver or a compiler: each has its own classes
                raise UserError(
                    f"the kernel {name} fails on {device} ({type(e).__name__}: "
                    f"{first_line(e)[:200]}): --plain trains without these kernels"
                ) from e
            if not worst < tolerance:
                raise UserError(
                    f"the kernel {name} is wrong on {device} in {dtype} (by {worst:.2g}): "
                    "--plain trains without these kernels"
                )


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_cpu(plain, made):
    def run(*arguments):
        dtypes = {a.dtype for a in arguments if isinstance(a, torch.Tensor)}
        able = dtypes <= {torch.float32, torch.bfloat16} and not ONLY_PLAIN and native()[0]
        return (made if able else plain)(*arguments)

    return run


def on_cuda(plain, made):
    return lambda *arguments: (plain if ONLY_PLAIN or not has_triton() else made)(*arguments)


for schema, (plain, made_of_cpp, made_of_triton) in FORMULAS.items():
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    LIBRARY.impl(name, on_cpu(plain, made_of_cpp), "CPU")
    LIBRARY.impl(name, on_cuda(plain, made_of_triton), "CUDA")


class Operators:
    """The operators by name; while a model is exported the plain formulas, which other runtimes know."""

    def __getattr__(self, name: str):
        return (
            globals()[f"plain_{name}"] if torch.compiler.is_exporting() else getattr(torch.ops.snac48, name)
        )


ops = Operators()
