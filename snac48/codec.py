"""The codec: its geometry, loading SNAC, encoding. Everything is read from the model, never from a constant.

Imports torch, numpy and snac alone: together with decoder.py and streaming.py this file opens a trained
decoder anywhere.
"""

import contextlib
import functools
import hashlib
import json
import math
import threading
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.utils.parametrize as P
from snac import SNAC
from snac.layers import NoiseBlock, ResidualUnit

try:
    from .cli import UserError, pick_device
    from .layers import add_noise, replace_layers, run
except ImportError:  # this file was copied into somebody's server: snac's own layers decode the same
    pick_device = torch.device
    replace_layers = lambda module: module
    run = lambda layers, x: functools.reduce(lambda x, layer: layer(x), layers, x)
    add_noise = lambda x, noise, linear: x + noise * linear(x)

    class UserError(ValueError):
        """Something the caller can mend, in one sentence."""


class InputError(UserError, ValueError):
    """What a function was handed cannot be meant. Raised before anything is computed: on a GPU a code outside
    the codebook would be an assertion that ends the process."""


# of the hub; another model is named with its own: NAME@REVISION
PINNED_REVISIONS = {"hubertsiuzdak/snac_24khz": "d73ad176a12188fcf4f360ba3bf2c2fbbe8f58ec"}


# ---- geometry ----


@dataclass(frozen=True)
class Geometry:
    """What makes codes of one model unusable with another; the cache's schema metadata holds it as `snac`."""

    pretrained_model: str
    weights_sha256: str  # of encoder and quantizer: they alone decide the codes
    sampling_rate: int  # Hz
    hop_length: int  # samples a latent frame
    vq_strides: tuple[int, ...]  # latent frames a code, coarse to fine
    codebook_size: int

    @property
    def coarse_samples(self) -> int:
        """Samples at the model's rate that one coarse (scale-0) code covers."""
        return self.vq_strides[0] * self.hop_length

    @property
    def per_coarse(self) -> list[int]:
        """Codes of each scale in one coarse code."""
        return [self.vq_strides[0] // stride for stride in self.vq_strides]

    def coarse_len(self, segment_seconds: float) -> int:
        """Coarse codes in a segment of nominally `segment_seconds`, at least 1."""
        return max(1, int(segment_seconds * self.sampling_rate / self.hop_length / self.vq_strides[0] + 1e-9))

    def difference(self, other: "Geometry") -> str | None:
        """What differs from `other`, the name of the model aside; None when codes are interchangeable."""
        a, b = asdict(self), asdict(other)
        found = [f"{k} {b[k]} there, {a[k]} here" for k in a if k != "pretrained_model" and a[k] != b[k]]
        return "; ".join(found) or None

    def check_config(self, config: dict, where: str) -> None:
        """Raises UserError where a model of these arguments of SNAC has another geometry."""
        own = {k: config[k] for k in ("sampling_rate", "codebook_size")}
        own |= {"vq_strides": tuple(config["vq_strides"]), "hop_length": math.prod(config["decoder_rates"])}
        wrong = [f"{k} {getattr(self, k)}, the model {v}" for k, v in own.items() if getattr(self, k) != v]
        if wrong:
            raise UserError(f"{where}: the geometry says {'; '.join(wrong)}")

    @staticmethod
    def from_json(text: str, where: str = "codec geometry") -> "Geometry":
        """Raises UserError beginning with `where` when it is no geometry a codec can have."""
        try:
            d = json.loads(text)
            g = Geometry(**(d | {"vq_strides": tuple(d["vq_strides"])}))
            sizes = (g.sampling_rate, g.hop_length, g.codebook_size, *g.vq_strides)
            whole = all(isinstance(n, int) and n > 0 for n in sizes) and g.vq_strides
            if not whole or any(g.vq_strides[0] % s for s in g.vq_strides):
                raise ValueError("a size that no codec has")
            return g
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{where}: {str(text)[:80]!r} describes no codec ({e})") from None


def slice_at(start: int, coarse_len: int, hop_length: int, vq_strides) -> dict:
    """Where `coarse_len` coarse codes from coarse code `start` lie: in every scale and in the audio. Returns
    {scale_start: [K], scale_len: [K], start_sample_24k, samples_24k, start_sample_48k, samples_48k}; samples
    are exact (no nominal seconds), 48 kHz values are twice the 24 kHz ones."""
    s = vq_strides[0]
    first, n = start * s * hop_length, coarse_len * s * hop_length
    scales = {"scale_start": [start * (s // v) for v in vq_strides],
              "scale_len": [coarse_len * (s // v) for v in vq_strides]}  # fmt: skip
    samples = {
        "start_sample_24k": first,
        "samples_24k": n,
        "start_sample_48k": 2 * first,
        "samples_48k": 2 * n,
    }
    return scales | samples


# ---- what callers hand in ----


def as_tensor(x, kinds: str, what: str):
    """A tensor, or numpy array as one, of a dtype among `kinds`: "integer" or "floating"."""
    if isinstance(x, np.ndarray) and x.dtype.kind in "iuf":
        x = torch.from_numpy(x.astype(np.float64 if x.dtype.kind == "f" else np.int64))
    if not isinstance(x, torch.Tensor):
        kind = f"array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise InputError(f"{what} is a {kind}: give a tensor or a numpy array of {kinds} numbers")
    integer = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    if x.layout != torch.strided or integer != (kinds == "integer") or x.is_complex():
        layout = "" if x.layout == torch.strided else f"{x.layout} of "
        raise InputError(f"{what} holds {layout}{str(x.dtype)[6:]} values: {kinds} numbers are wanted")
    return x


def check_codes(codes, geometry: Geometry, align: int = 1, batch=None, empty=False) -> list:
    """codes, a list of [B, T_k] (tensors or numpy arrays) a scale -> the same as integer tensors. Raises
    InputError where they are none of this codec's, or not of `batch` streams. align: coarse codes a piece is
    a multiple of; empty: T_k may be 0."""
    per = geometry.per_coarse
    wanted = "[" + ", ".join(f"[B, {f}T]" if f > 1 else "[B, T]" for f in per) + "]"
    if not isinstance(codes, (list, tuple)) or len(codes) != len(per):
        got = f"{len(codes)} scales" if isinstance(codes, (list, tuple)) else type(codes).__name__
        raise InputError(f"codes must be a list of {len(per)} scales {wanted}, got {got}")
    codes = [as_tensor(c, "integer", f"codes[{k}]") for k, c in enumerate(codes)]
    shapes = [tuple(c.shape) for c in codes]
    if any(len(shape) != 2 for shape in shapes):
        raise InputError(f"codes must be {wanted}, got shapes {shapes}")
    rows, steps = shapes[0]
    if shapes != [(rows, steps * f) for f in per]:
        raise InputError(f"the scales don't match: codes must be {wanted}, got shapes {shapes}")
    if not rows or (batch is not None and rows != batch):
        raise InputError(
            f"codes of {rows} streams" + (f": there are {batch}" if batch else ", none to decode")
        )
    if steps % align or not (steps or empty):
        unit = f": attention sees {align} at a time, give a multiple" if align > 1 and steps else ""
        raise InputError(f"codes of {steps} coarse steps{unit or ', none to decode'}")
    if steps:
        device, size = codes[0].device, geometry.codebook_size
        found = torch.stack([v.to(device) for c in codes for v in (c.min(), c.max())]).view(-1, 2).tolist()
        for k, (low, high) in enumerate(found):  # one wait for the device
            if low < 0 or high >= size:
                wrong = low if low < 0 else high
                raise InputError(f"codes[{k}] holds {wrong}: this codebook has the entries 0 to {size - 1}")
    return codes


def check_audio(audio):
    """audio [B, 1, N], a tensor or numpy array -> float32 tensor. Raises InputError."""
    audio = as_tensor(audio, "floating", "audio")
    if audio.ndim != 3 or audio.shape[1] != 1 or not audio.numel():
        raise InputError(f"audio must be [B, 1, N] with at least one sample, got shape {tuple(audio.shape)}")
    if not bool(torch.isfinite(audio).all()):
        raise InputError("audio holds NaN or infinite samples")
    return audio.float()


def check_seeds(noise_seed, batch) -> list[int]:
    """A seed of the noise for each of `batch` streams. noise_seed: an integer for all, or a list of them."""
    if not isinstance(batch, int) or isinstance(batch, bool) or not 1 <= batch <= 1 << 16:
        raise InputError(f"batch {batch!r} is not a number of streams")
    seeds = list(noise_seed) if isinstance(noise_seed, (list, tuple)) else [noise_seed] * batch
    whole = all(isinstance(s, int) and not isinstance(s, bool) and -(1 << 63) <= s < 1 << 63 for s in seeds)
    if not whole or len(seeds) != batch:
        raise InputError(f"noise_seed {noise_seed!r} must be an integer of 64 bits, or a list of {batch}")
    return seeds


HUB_TIMEOUT_S = 5.0


def fetch(repo: str, revision: str, files: list[str], instead: str) -> Path:
    """Folder with these files of a repository on the model hub: as downloaded before, else downloaded now.

    The hub is asked once, for a few seconds, before its client begins to retry. instead: what gives a local
    folder, for the UserError.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S
        )
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as e:
        raise UserError(
            f"{repo} is not here and the model hub {constants.ENDPOINT} can't be reached "
            f"({getattr(e, 'reason', e)}): copy {' and '.join(files)} of revision {revision} into a folder "
            f"and give {instead}"
        ) from None
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as e:  # network and hub errors have many classes; all mean the same to the user
        raise UserError(f"{repo} could not be fetched from the hub ({str(e).splitlines()[0]})") from e


def load_snac(name: str, device="cpu"):
    """A frozen SNAC in eval mode from a folder (config.json, pytorch_model.bin) or the hub (pinned revision).
    name: DIR, hub id, or hub id@REVISION. Raises UserError saying what is missing."""
    repo, _, revision = name.partition("@")
    revision = revision or PINNED_REVISIONS.get(repo)
    if Path(name).is_dir():
        repo = name
        if missing := [f for f in ("config.json", "pytorch_model.bin") if not (Path(name) / f).is_file()]:
            raise UserError(f"model folder {name} lacks {' and '.join(missing)}")
    elif name.startswith((".", "/")) or name.count("/") != 1:
        known = next(iter(PINNED_REVISIONS))
        raise UserError(f"model {name} is neither a folder nor a hub id such as {known}")
    elif not revision:
        raise UserError(f"no pinned revision is known for {repo}: say {repo}@COMMIT")
    else:
        name = str(fetch(repo, revision, ["config.json", "pytorch_model.bin"], "--pretrained_model DIR"))
    try:
        model = SNAC.from_pretrained(name)
    except Exception as e:  # hub, network, config and weights each have their own exception classes
        first = str(e).partition("\n")[0]
        raise UserError(
            f"model {name} could not be loaded ({type(e).__name__}: {first}); "
            "give --pretrained_model a folder with config.json and pytorch_model.bin, or make "
            "the hub reachable"
        ) from e
    check_finite(model.state_dict(), f"model {name}")
    for k, vq in enumerate(model.quantizer.quantizers):
        if bool((vq.codebook.weight == vq.codebook.weight[0]).all()):
            raise UserError(
                f"model {name}: all entries of codebook {k} are the same, so no code says anything"
            )
    return replace_layers(model).to(device).eval().requires_grad_(False)


ENCODER = "encoder.safetensors"  # in an exported folder


def load_encoder(name: str, device="cpu"):
    """A SNAC that encodes: load_snac, or an exported folder that holds its encoder."""
    folder = Path(name)
    if not (folder / ENCODER).is_file():
        return load_snac(name, device)
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_config"]
        parts = load_file(folder / "model.safetensors")
        quantizer = {k.removeprefix("quantizer."): v for k, v in parts.items() if k.startswith("quantizer.")}
        model, encoder = SNAC(**config), load_file(folder / ENCODER)
    except Exception as e:  # safetensors has its own exception classes
        raise UserError(f"{name} cannot be read: {type(e).__name__}: {str(e)[:200]}") from None
    load_weights(model.encoder, encoder, folder / ENCODER)
    load_weights(model.quantizer, quantizer, folder / "model.safetensors")
    check_finite(encoder, str(folder / ENCODER))
    return replace_layers(model).to(device).eval().requires_grad_(False)


def check_finite(state: dict, where: str) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity."""
    for key, x in state.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise UserError(f"{where} holds NaN or infinite weights, first in {key}: nothing can be decoded")


def weights_hash(state: dict) -> str:
    """SHA-256 of encoder and quantizer in a state dict."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        if key.startswith(("encoder.", "quantizer.")):
            tensor = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{key} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def file_hash(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def geometry_of(model, name: str) -> Geometry:
    """Geometry and weights hash of a loaded SNAC."""
    return Geometry(
        pretrained_model=name,
        weights_sha256=weights_hash(model.state_dict()),
        sampling_rate=int(model.sampling_rate),
        hop_length=int(model.hop_length),
        vq_strides=tuple(int(v) for v in model.vq_strides),
        codebook_size=int(model.codebook_size),
    )


def fold_weight_norm(module):
    """Replace weight-norm parametrizations by plain weights: same function, no renormalising at every
    call."""
    for m in module.modules():
        if P.is_parametrized(m, "weight"):
            P.remove_parametrizations(m, "weight")
    return module


def align_samples(model) -> int:
    """SNAC pads to, and chunks are cut at, multiples of hop x lcm(coarsest stride, attention window)."""
    return int(model.hop_length) * math.lcm(int(model.vq_strides[0]), model.attn_window_size or 1)


def receptive_reach(layers, jump: float = 1.0) -> tuple[float, float]:
    """(reach on each side in input samples, output jump) of a stack of convolutions in order. jump: input
    samples a step at the first layer; strided convs multiply it, transposed ones divide it. Residual branches
    are covered because every convolution on the longest path is counted."""
    reach = 0.0
    for layer in layers:
        for m in layer.modules():
            if isinstance(m, torch.nn.Conv1d):
                reach += jump * (m.dilation[0] * (m.kernel_size[0] - 1)) / 2
                jump *= m.stride[0]
            elif isinstance(m, torch.nn.ConvTranspose1d):
                jump /= m.stride[0]
                reach += jump * m.kernel_size[0] / 2
    return reach, jump


def encode_context(model) -> int:
    """Samples beside a chunk with which its codes are those of the whole: what the encoder can see, in whole
    units. With windowed attention a chunk must start at a window, and sees its neighbours by convs only."""
    reach, _ = receptive_reach(model.encoder.block)
    return math.ceil(reach / align_samples(model)) * align_samples(model)


IEEE_LOCK = threading.RLock()


@contextlib.contextmanager
def ieee_fp32(device_type: str):
    """Matrix products and convolutions in full fp32 for the time of the block, whatever the defaults: cuDNN
    takes TF32 (10 bits of mantissa) unless told otherwise, and a training may have switched on TF32 or
    autocast; the latents then move enough to change codes. The settings are the process's: one thread at a
    time."""
    with IEEE_LOCK:
        yield from _ieee_fp32(device_type)


def _ieee_fp32(device_type: str):
    backends = torch.backends
    kinds = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for kind, precision in zip(kinds, before):
            kind.fp32_precision = precision


def encoding_of(model) -> dict:
    """How `encode` computes here, for the cache's schema metadata: other hardware rounds otherwise."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"dtype": "float32", "tf32": False, "torch": torch.__version__, "device": name}


def encode(model, audio, max_seconds: float = 60.0):
    """Codes of equally long clips: audio [B, 1, N] at the model's rate -> [codes_k [B, T_k]], as SNAC.encode.
    Clips longer than max_seconds are encoded in chunks with as much real context as the encoder can see, so
    the memory is bounded and the codes are those of one pass (up to rounding). Computes in IEEE fp32."""
    with ieee_fp32(audio.device.type):
        return encode_chunks(model, audio, max_seconds)


def encode_chunks(model, audio, max_seconds: float):
    align = align_samples(model)
    chunk = max(1, int(max_seconds * model.sampling_rate) // align) * align
    if audio.shape[-1] <= chunk:
        return model.encode(audio)
    audio, context = model.preprocess(audio), encode_context(model)
    parts = []
    for start in range(0, audio.shape[-1], chunk):
        lo, hi = max(0, start - context), min(audio.shape[-1], start + chunk + context)
        codes = model.encode(audio[..., lo:hi])
        for k, c in enumerate(codes):
            step = model.hop_length * model.vq_strides[k]
            codes[k] = c[:, (start - lo) // step : (min(start + chunk, audio.shape[-1]) - lo) // step]
        parts.append(codes)
    return [torch.cat([p[k] for p in parts], dim=1) for k in range(len(parts[0]))]


def new_snac(path: str):
    """A SNAC with fresh weights from a JSON file of its arguments. Raises UserError."""
    try:
        return replace_layers(SNAC(**json.loads(Path(path).read_text(encoding="utf-8")))).eval()
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"--from_scratch {path} is no SNAC configuration: {e}") from None


def load_weights(model, state: dict, path) -> None:
    """load_state_dict after checking keys, shapes and dtypes: one sentence instead of a page."""
    check_weights(model, state, path)
    model.load_state_dict(state)


def check_weights(model, state: dict, path) -> None:
    own = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
    theirs = {k: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else None for k, v in dict(state).items()}
    wrong = sorted(map(str, set(own) ^ set(theirs))) + [k for k in own if k in theirs and own[k] != theirs[k]]
    if wrong:
        raise UserError(
            f"weights in {path} don't fit this model: {len(wrong)} tensors differ in name, "
            f"shape or dtype, first {wrong[0]}"
        )


def model_config(snac) -> dict:
    """Arguments of SNAC(**config): with them a checkpoint opens without the pretrained folder."""
    first_unit = next(m for m in snac.encoder.modules() if isinstance(m, ResidualUnit))
    names = ("sampling_rate", "encoder_dim", "encoder_rates", "latent_dim", "decoder_dim", "decoder_rates",
             "attn_window_size", "codebook_size", "codebook_dim", "vq_strides")  # fmt: skip
    found = {name: getattr(snac, name) for name in names}
    return {k: list(v) if k.endswith(("rates", "strides")) else v for k, v in found.items()} | {
        "noise": any(isinstance(m, NoiseBlock) for m in snac.decoder.modules()),
        "depthwise": first_unit.block[1].groups > 1,
    }
