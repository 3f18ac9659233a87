"""snac48/speed.py: what is decided by device, micro-batches from free memory; and that bf16 is right."""

import argparse
import math

import pytest
import torch
from conftest import make_snac, run, voice
from helpers.training import metrics, training

import train_dual_head as T
from snac48 import codec, kernels, schedule, speed
from snac48.codebooks import FullCodec
from snac48.decoder import DualHeadDecoder
from snac48.ranks import Ranks

CPU = torch.device("cpu")


def options(*argv):
    values = T.DEFAULTS | {"recipe": "phase12"} | dict(argv)
    return argparse.Namespace(**values)


@pytest.fixture(autouse=True)
def as_before():
    yield
    kernels.use_plain(False)
    torch.use_deterministic_algorithms(False)


def test_what_the_device_decides_is_said_with_its_reason():
    args = options()
    plan = schedule.make_plan(args, 1000)
    found = speed.settle(args, CPU, plan)
    assert (args.bf16, args.tf32, found.compile, found.num_workers) == (False, False, False, 1)
    text = "\n".join(found.told)
    for line in ("bf16 False (fp32 on a CPU)", "tf32 False (a matter of GPUs)", kernels.prepare("cpu")):
        assert line in text
    args = options(("bf16", True), ("num_workers", 3))
    found = speed.settle(args, CPU, plan)
    assert (args.bf16, found.num_workers) == (True, 3) and "bf16 True (asked for)" in found.told
    args = options(("plain", True))
    assert "Snake: plain formulas (asked for)" in speed.settle(args, CPU, plan).told


def test_a_gpu_gets_bf16_tf32_and_compiles_short_steps(monkeypatch):
    """The rules of a GPU, on a machine that has none."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of the test")
    monkeypatch.setattr(speed.os, "sched_getaffinity", lambda pid: set(range(32)))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        for world, short in (("4", False), ("16", True)):  # 192 s a step: 48 s or 12 s a GPU
            monkeypatch.setenv("WORLD_SIZE", world)
            args = options()
            found = speed.settle(args, torch.device("cuda:0"), schedule.make_plan(args, 100000))
            assert (args.bf16, args.tf32, found.compile, found.num_workers) == (True, True, short, 8)
        assert torch.backends.cudnn.benchmark and torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before
        torch._dynamo.config.recompile_limit = 8


def test_counted_memory_is_what_a_longer_step_takes(snac):
    """Steps of one and two seconds foretell one of five; bf16 takes about half; flags and gradients stay."""
    model, args = DualHeadDecoder(make_snac(1)), options()
    geometry, flags = codec.geometry_of(snac, "x"), [p.requires_grad for p in model.parameters()]
    a_second, besides = speed.bytes_a_second(model, geometry, args, bf16=False)
    further, _ = speed.bytes_a_second(model, geometry, args, bf16=False, lengths=(2.0, 5.0))
    assert abs(further / a_second - 1) < 0.03 and besides >= 12 * sum(p.numel() for p in model.parameters())
    half, _ = speed.bytes_a_second(model, geometry, args, bf16=True)
    assert half / a_second < 0.8  # of a tiny decoder the spectra, fp32, are much
    assert flags == [p.requires_grad for p in model.parameters()] and not model.trunk_frozen
    assert all(p.grad is None for p in model.parameters())
    whole = DualHeadDecoder(make_snac(1), ("24k",), with_encoder=True)
    args = options(("heads", "24k"), ("freeze_encoder", False))
    with_encoder = FullCodec(whole, codec.align_samples(snac))
    decoder_alone, _ = speed.bytes_a_second(whole, geometry, options(("heads", "24k")), False)
    more, _ = speed.bytes_a_second(whole, geometry, args, False, with_encoder)
    assert more > 1.3 * decoder_alone


def test_micro_batches_from_free_memory():
    plan = schedule.make_plan(options(), 10**6)  # 192 x 1 s, 96 x 2 s, 57 x 3 s, 43 x 4 s
    accum = lambda free, world=1: speed.accum_for(plan, world, free * 1e9, 133e6, 0.2e9)
    assert [accum(n) for n in (141, 80, 24, 16)] == [1, 1, 2, 3]
    assert accum(24, 4) == 1
    assert accum(1.2) == 57  # 5.7 s at once: five of 1 s, two of 2 s, one of 3 s
    assert accum(0.01) == 192  # one utterance each
    for free in (5, 9, 24):  # what is promised
        for e in plan:
            assert 0.2e9 + 133e6 * e.segment * math.ceil(e.batch / accum(free)) <= 0.8 * free * 1e9


def test_accum_is_said_and_a_flag_wins(snac, monkeypatch):
    model, geometry = DualHeadDecoder(make_snac(1)), codec.geometry_of(snac, "x")
    plan = schedule.make_plan(options(), 10**6)

    def settled(free, **given):
        monkeypatch.setattr(speed, "free_memory", lambda device: free)
        found = speed.Speed(False, False, 0)
        speed.settle_accum(found, options(*given.items()), plan, Ranks(0, 1, CPU), model, geometry)
        return found.accum_steps, found.told[-1]

    assert settled(1e15) == (1, "accum_steps 1 (192 s of audio fit by far)")
    steps, line = settled(1e9)
    assert steps > 1 and "MB a second of audio, 192 s a step, 1.0 GB free" in line
    assert settled(1e9, accum_steps=2) == (2, "accum_steps 2 (asked for)")
    assert settled(1e9, plain=True) == (1, "accum_steps 1 (--plain)")


def test_one_command_prints_what_cards_take(snac_dir):
    done = run("train_dual_head.py", "--print_memory", "24,80", "--pretrained_model", snac_dir)
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line[:2] in ("bf", "fp")] == ["bf16", "fp32"]
    assert sum(line.strip().startswith(("24 GB", "80 GB")) for line in lines) == 4
    assert all("1 x " in line for line in lines if " GB  " in line)  # a tiny model fits


# ---- bf16 that is right ----


def test_bf16_rounds_neither_waveform_nor_codes():
    """Last convolution and tanh of either head, and the codes' entries, stay fp32 under autocast."""
    model = DualHeadDecoder(make_snac(2)).eval()
    codes = [torch.randint(64, (2, 6 * f)) for f in (1, 2, 4)]
    model.set_noise(torch.arange(2))
    with torch.no_grad():
        exact = model(codes)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.codes_to_z(codes).dtype == torch.float32
            assert torch.equal(model.codes_to_z(codes), model.codes_to_z(codes))
            rounded = model(codes)
    for a, b in zip(rounded, exact):
        assert a.dtype == torch.float32 and 1e-5 < (a - b).abs().max() < 0.1
        assert len(torch.unique(a)) > 0.9 * a.numel()  # bf16 has 256 values an octave


def test_codes_of_the_feature_phase_are_those_of_fp32():
    snac = make_snac(3)
    model = DualHeadDecoder(snac, ("24k",), with_encoder=True)
    whole, seen = FullCodec(model, codec.align_samples(snac)), []
    whole.from_features = True
    hook = model.quantizer.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    audio = torch.from_numpy(voice(2.0, 24000, 1)[None, None])
    with torch.no_grad():
        whole(audio[..., : audio.shape[-1] // 2048 * 2048])
        with torch.autocast("cpu", torch.bfloat16):
            whole(audio[..., : audio.shape[-1] // 2048 * 2048])
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(*seen)) and seen[0][0].unique().numel() > 5


def test_plain_and_fast_training_agree(cache_dir, targets_dir, snac_dir, tmp_path):
    """The same losses to 1e-4, and a run says at its start what computes."""
    losses = []
    for name, more in (("fast", ()), ("plain", ("--plain",))):
        out = tmp_path / name
        assert training(cache_dir, targets_dir, snac_dir, out, "--log_every", 1, *more).train() == 0
        log = (out / "training.log").read_text()
        assert ("Snake: plain formulas (asked for)" in log) == (name == "plain") and "accum_steps 1 (" in log
        losses.append([row["loss_48k"] for row in metrics(out)])
    assert len(losses[0]) >= 2
    for fast, plain in zip(*losses, strict=True):
        assert fast == pytest.approx(plain, rel=1e-4)
