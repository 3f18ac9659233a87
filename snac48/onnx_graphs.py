"""The decoder as ONNX graphs, for servers without PyTorch. Noise is an input, so the samples are PyTorch's.

whole:   codes_0 … codes_K-1 [B, T_k], noise_0 … [B, 1, T * rate] -> audio_24k, audio_48k: any batch and
length stream:  codes, position, end [B], noise, state_0 … -> audio, new_state_0 …: one piece of a stream,
of any length

noise_i: standard normal, zeros for none. position: latent frames before this piece, of each stream; end: of
its utterance, where that is known (past it codes are ignored), else position plus this piece's. At first
the state is zeros. The audio of a head lags by `lag` samples (in the graph's metadata): leave them out at
the beginning; at the end push codes 0 for another `ahead` latent frames, with `end` where the utterance
ended. """

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
    def __init__(self, tts: DualHead):
        super().__init__() self.model, self.noises, self.per_coarse = tts.model, tts.model.noises,
        tts.geometry.per_coarse scales = range(len(self.per_coarse)) stride = tts.geometry.vq_strides[0]
        self.inputs = {f"codes_{k}": f for k, f in enumerate(self.per_coarse)}  # name: length of a coarse
        code self.inputs |= {f"noise_{m.layer}": m.rate * stride for m in self.noises} self.outputs,
        self.codes = [f"audio_{head}" for head in tts.heads], len(scales) self.metadata = {"kind": "whole",
        "rates": list(tts.rates)}

    def forward(self, *inputs):
        self.model.set_noise(None)
        for m, noise in zip(self.noises, inputs[self.codes :]):
            m.noise = noise
        return tuple(x for x in self.model(list(inputs[: self.codes])) if x is not None)

    def example(self, tts, batch: int, coarse: int, seed: int, state=None) -> list:
        """Inputs of random codes and the noise that tts.decode has with this seed."""
        g = torch.Generator().manual_seed(seed)
        codes = [torch.randint(tts.geometry.codebook_size, (batch, coarse * f), generator=g)
                 for f in self.per_coarse]  # fmt: skip
        return [*codes, *noise_inputs(tts, seed, batch, coarse * tts.geometry.vq_strides[0])]


class Piece(Whole):
    def __init__(self, tts: DualHead):
        super().__init__(tts) self.heads = tts.heads plan = streaming.plan(tts.model, tts.heads, tts.window,
        tts.device) self.shapes, self.lags = plan.shapes, plan.lags self.inputs |= {"position": None, "end":
        None} | {f"state_{i}": 0 for i in range(len(plan.shapes))} self.outputs += [f"new_state_{i}" for i
        in range(len(plan.shapes))] self.metadata = {"kind": "stream", "rates": list(tts.rates), "lag":
        list(plan.lags), "ahead": plan.ahead,
                         "noise": [list(span) for span in plan.spans],  # number, samples a latent frame, lag
                         "state": [list(shape) for shape in plan.shapes]}  # fmt: skip

    def forward(self, *inputs):
        codes, rest = list(inputs[: self.codes]), inputs[self.codes :]
        noise, (position, end, *state) = rest[: len(self.noises)], rest[len(self.noises) :]
        z = self.model.codes_to_z(codes)
        audio, _, step = streaming.advance(self.model, z, self.heads, state, (position, end), noise)
        return (*audio, *step.kept)

    def example(self, tts, batch: int, coarse: int, seed: int) -> list:
        frames = coarse * tts.geometry.vq_strides[0]
        state = [torch.zeros(batch, *shape) for shape in self.shapes]
        at = [torch.zeros(batch, dtype=torch.int64), torch.full((batch,), frames)]
        return [*super().example(tts, batch, coarse, seed), *at, *state]


def noise_inputs(tts: DualHead, noise_seed: int, batch: int, frames: int, position: int = 0, stream=False)
-> list:
    """noise_0, … for `frames` latent frames: those of tts.decode(codes, noise_seed=…). stream: for the
    graph of a stream, whose layers lag.""" plan = streaming.plan(tts.model, tts.heads, tts.window,
    tts.device) spans = [(layer, position * rate - (lag if stream else 0), frames * rate) for layer, rate,
    lag in plan.spans] key = torch.full((batch,), noise_seed, dtype=torch.int64) return
    tts.model.positioned_noise(key, spans, "cpu") if spans else []


def export(tts: DualHead, path: str, stream: bool = False, weights: str = "fp32") -> str:
    """Write a graph with dynamic batch and length, and compare it with PyTorch in onnxruntime. weights:
    fp32, or how they are stored: fp16 halves the file, int8 (a scale for each channel) quarters it;
    arithmetic stays float32. Returns what to tell. Raises UserError."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UserError(f"--export_onnx needs {e.name}: pip install 'snac48[onnx]' or onnx onnxscript onnxruntime") from None
    graph = (Piece if stream else Whole)(tts).eval()
    proto = traced(tts, graph)
    exact = compare(tts, graph, proto)
    if not exact < 1e-4:
        raise UserError(f"{path} computes something else than PyTorch (difference {exact:.2g})")
    if weights != "fp32":
        store(proto, weights)
    told = {"opset": str(OPSET), "weights": weights, "snac48": json.dumps(graph.metadata)}
    onnx.helper.set_model_props(proto, told)
    with atomic_file(path) as f:
        f.write(proto.SerializeToString())
    size, lossy = proto.ByteSize() / 1e6, ""
    if weights != "fp32":
        lossy = f"; with {weights} weights {compare(tts, graph, proto):.1e}"
    names = f"{short(graph.inputs)} -> {short(graph.outputs)}" return f"wrote {path} ({size:.1f} MB, opset
    {OPSET}): {names}; largest difference from PyTorch {exact:.1e}{lossy}"


def short(names) -> str:
    """codes_0, codes_1, codes_2 -> codes_0 … codes_2."""
    names = list(names)
    kinds = {}
    for name in names:
        kinds.setdefault(name.rstrip("0123456789"), []).append(name)
    return ", ".join(v[0] if len(v) == 1 else f"{v[0]} … {v[-1]}" for v in kinds.values())


def traced(tts: DualHead, graph):
    """The graph as ONNX's own structure."""
    free = torch.export.Dim.DYNAMIC
    shapes = [{0: free} if not length else {0: free, 1 if name.startswith("codes") else 2: free}
              for name, length in graph.inputs.items()]  # fmt: skip
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision isn't installed
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        program = torch.onnx.export(
            graph,
            tuple(graph.example(tts, 2, 5, 0)),
            dynamo=True,
            verbose=False,
            dynamic_shapes=(tuple(shapes),),
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            opset_version=OPSET,
        )
    return program.model_proto


def compare(tts: DualHead, graph, proto) -> float:
    """The largest difference from PyTorch over other sizes than the traced one, noise on."""
    try:
        import onnxruntime
    except ImportError as e:
        raise UserError(f"--export_onnx needs {e.name}: pip install onnxruntime") from None
    session, worst = onnxruntime.InferenceSession(proto.SerializeToString()), []
    for batch, coarse in ((1, 3), (3, 17)):
        given = graph.example(tts, batch, coarse, seed=batch)
        found = session.run(graph.outputs, {k: x.numpy() for k, x in zip(graph.inputs, given)})
        with torch.inference_mode():
            worst += [np.abs(a - b.numpy()).max() for a, b in zip(found, graph(*given)) if a.size]
    return float(np.max(worst))  # of anything and NaN: NaN


def store(proto, weights: str) -> None:
    """Large weights as float16, or int8 with a scale for each channel, with a node that makes float32 of
    them."""
    import onnx
    from onnx import TensorProto, numpy_helper

    graph, nodes = proto.graph, []
    for tensor in [t for t in graph.initializer if t.data_type == TensorProto.FLOAT]:
        value = numpy_helper.to_array(tensor)
        if value.size < LARGE:
            continue
        name = tensor.name
        if weights == "fp16":
            new = [numpy_helper.from_array(value.astype(np.float16), f"{name}_fp16")]
            nodes.append(onnx.helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
        else:
            scale = np.abs(value).max(tuple(range(1, value.ndim))) / 127 + 1e-12
            rounded = np.rint(value / scale.reshape(-1, *[1] * (value.ndim - 1))).astype(np.int8)
            new = [numpy_helper.from_array(rounded, f"{name}_int8"),
                   numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale")]  # fmt: skip
            inputs = [t.name for t in new]
            nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [name], axis=0))
        graph.initializer.remove(tensor)
        graph.initializer.extend(new)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
