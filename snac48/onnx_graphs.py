"""The decoder as ONNX graphs, for servers without PyTorch. Noise is an input, so the samples are PyTorch's.

whole:   codes_0 ... [B, T_k], noise_0 ... [B, 1, T * rate] -> audio_24k, audio_48k: any batch and length
stream:  codes, noise, position and end [B], state_0 ... -> audio, new_state_0 ...: a piece of any length

noise_i is standard normal, or zeros. position: latent frames before this piece, of each stream; end: latent
frames of its utterance (a large number until that is known). At first the state is zeros. The audio of a
head lags by `lag` samples (in the graph's metadata), which are to be left out at the beginning; at the end a
piece of codes 0 of `ahead` latent frames or more brings the last samples.
"""

import json
import logging
import warnings

import numpy as np
import torch

from . import streaming
from .cli import UserError
from .decoder import DualHead
from .files import atomic_file

OPSET = 18
LARGE = 4096  # values: smaller tensors stay float32 in fp16 and int8 files


class Whole(torch.nn.Module):
    """inputs: {name: axis of its length, or None}; outputs: names; metadata: what a server needs to know."""

    def __init__(self, tts: DualHead):
        super().__init__()
        self.model, self.noises, self.per_coarse = tts.model, tts.model.noises, tts.geometry.per_coarse
        self.inputs = {f"codes_{k}": 1 for k in range(len(self.per_coarse))}
        self.inputs |= {f"noise_{m.layer}": 2 for m in self.noises}
        self.outputs = [f"audio_{head}" for head in tts.heads]
        self.metadata = {"kind": "whole", "rates": list(tts.rates), "noise": [m.rate for m in self.noises]}

    def forward(self, *inputs):
        codes, noises = inputs[: len(self.per_coarse)], inputs[len(self.per_coarse) :]
        self.model.set_noise(None)
        for m, noise in zip(self.noises, noises):
            m.noise = noise
        return tuple(x for x in self.model(list(codes)) if x is not None)

    def example(self, tts, batch: int, coarse: int, seed: int) -> list:
        """Inputs: random codes and the noise that tts.decode has with this seed."""
        g, size = torch.Generator().manual_seed(seed), tts.geometry.codebook_size
        codes = [torch.randint(size, (batch, coarse * f), generator=g) for f in self.per_coarse]
        return codes + noise_inputs(tts, seed, batch, coarse * tts.geometry.vq_strides[0])


class Piece(Whole):
    def __init__(self, tts: DualHead):
        super().__init__(tts)
        self.heads, plan = tts.heads, tts.plan()
        self.shapes = plan.shapes
        self.inputs |= {"position": None, "end": None} | {f"state_{i}": None for i in range(len(plan.shapes))}
        self.outputs += [f"new_state_{i}" for i in range(len(plan.shapes))]
        self.metadata |= {"kind": "stream", "lag": plan.lags, "ahead": plan.ahead, "state": plan.shapes}

    def forward(self, *inputs):
        k, n = len(self.per_coarse), len(self.per_coarse) + len(self.noises)
        codes, noise, place, state = inputs[:k], inputs[k:n], inputs[n : n + 2], inputs[n + 2 :]
        z = self.model.codes_to_z(list(codes))
        audio, _, step = streaming.advance(self.model, z, self.heads, state, place, noise)
        return (*audio, *step.kept)

    def example(self, tts, batch: int, coarse: int, seed: int) -> list:
        state = [torch.zeros(batch, *shape) for shape in self.shapes]
        position, end = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), 1 << 40)
        return [*super().example(tts, batch, coarse, seed), position, end, *state]


def noise_inputs(tts: DualHead, noise_seed: int, batch: int, frames: int, position=None) -> list:
    """noise_0, ... of `frames` latent frames: what tts.decode(codes, noise_seed=...) has. position: of a
    piece of a stream, whose layers lag."""
    first = lambda rate, lag: 0 if position is None else position * rate - lag
    spans = [(layer, first(rate, lag), frames * rate) for layer, rate, lag in tts.plan().spans]
    key = torch.full((batch,), noise_seed, dtype=torch.int64)
    return list(tts.model.positioned_noise(key, spans, "cpu")) if spans else []


def export(tts: DualHead, path: str, stream: bool = False, weights: str = "fp32") -> str:
    """Write a graph with dynamic batch and length, compared with PyTorch in onnxruntime. weights: fp32, or
    how they are stored: fp16 halves the file, int8 (a scale for each channel) quarters it; the arithmetic
    stays float32. Returns what to tell. Raises UserError."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UserError(f"--export_onnx needs {e.name}: pip install onnx onnxscript onnxruntime") from None
    graph = (Piece if stream else Whole)(tts).eval()
    proto = traced(tts, graph)
    exact = compare(tts, graph, proto)
    if not exact < 1e-4:
        raise UserError(f"{path} computes something else than PyTorch (difference {exact:.2g})")
    told = f"largest difference from PyTorch {exact:.1e}"
    if weights != "fp32":
        store(proto, weights)
        told += f", with {weights} weights {compare(tts, graph, proto):.1e}"
    onnx.helper.set_model_props(proto, {"snac48": json.dumps(graph.metadata | {"weights": weights})})
    with atomic_file(path) as f:
        f.write(proto.SerializeToString())
    names = f"{short(graph.inputs)} -> {short(graph.outputs)}"
    return f"wrote {path} ({proto.ByteSize() / 1e6:.1f} MB, opset {OPSET}): {names}; {told}"


def short(names) -> str:
    """codes_0, codes_1, codes_2 -> codes_0 to codes_2."""
    kinds = {}
    for name in names:
        kinds.setdefault(name.rstrip("0123456789"), []).append(name)
    return ", ".join(v[0] if len(v) == 1 else f"{v[0]} to {v[-1]}" for v in kinds.values())


def traced(tts: DualHead, graph):
    """The graph as ONNX's own structure."""
    free = torch.export.Dim.DYNAMIC
    shapes = tuple({0: free} if axis is None else {0: free, axis: free} for axis in graph.inputs.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision isn't installed
    options = {"dynamo": True, "verbose": False, "opset_version": OPSET, "dynamic_shapes": (shapes,)}
    names = {"input_names": list(graph.inputs), "output_names": graph.outputs}
    with warnings.catch_warnings(action="ignore", category=FutureWarning), torch.no_grad():
        program = torch.onnx.export(graph, tuple(graph.example(tts, 2, 5, 0)), **options, **names)
    return program.model_proto


def compare(tts: DualHead, graph, proto) -> float:
    """The largest difference from PyTorch, noise on, at other sizes than the traced one."""
    import onnxruntime

    session, differences = onnxruntime.InferenceSession(proto.SerializeToString()), []
    for batch, coarse in ((1, 3), (3, 17)):
        given = graph.example(tts, batch, coarse, seed=batch)
        found = session.run(graph.outputs, {k: x.numpy() for k, x in zip(graph.inputs, given)})
        with torch.inference_mode():
            differences += [np.abs(a - b.numpy()).max() for a, b in zip(found, graph(*given))]
    return float(np.max(differences))  # of anything and NaN: NaN


def store(proto, weights: str) -> None:
    """Large weights as float16, or as int8 with a scale a channel; a node makes float32 of them."""
    import onnx
    from onnx import TensorProto, numpy_helper

    graph, nodes = proto.graph, []
    for tensor in [t for t in graph.initializer if t.data_type == TensorProto.FLOAT]:
        value, name = numpy_helper.to_array(tensor), tensor.name
        if value.size < LARGE:
            continue
        if weights == "fp16":
            made = {f"{name}_fp16": value.astype(np.float16)}
            node = onnx.helper.make_node("Cast", [*made], [name], to=TensorProto.FLOAT)
        else:
            scale = (np.abs(value).max(tuple(range(1, value.ndim))) / 127 + 1e-12).astype(np.float32)
            whole = np.rint(value / scale.reshape(-1, *[1] * (value.ndim - 1))).astype(np.int8)
            made = {f"{name}_int8": whole, f"{name}_scale": scale}
            node = onnx.helper.make_node("DequantizeLinear", [*made], [name], axis=0)
        nodes.append(node)
        graph.initializer.remove(tensor)
        graph.initializer.extend(numpy_helper.from_array(x, key) for key, x in made.items())
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
