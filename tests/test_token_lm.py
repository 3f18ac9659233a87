"""snac48/token_lm.py: the four patterns, their loss, sampling, and which steps are skipped."""

import argparse
import math

import numpy as np
import pytest
import torch
from helpers.rvq import PATTERNS, codes_like, toy

import train_rvq
from snac48 import token_lm
from snac48.checkpoint import save_checkpoint
from snac48.cli import UserError

# ---- model and loss ----


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("V", [1024, 4096])
def test_first_loss_is_ln_v(pattern, V):
    model = toy(pattern, (V,) * 3, d=64)
    codes = codes_like(model, 2, 12)
    nll, flat = token_lm.token_losses(model(codes), codes, model.sizes)
    assert nll.mean().item() == pytest.approx(math.log(V), rel=0.01)
    assert flat.mean().item() == pytest.approx(math.log(V), rel=0.01)


def order_of(pattern, t, k, K):
    """When a token is sampled: what comes at the same time or later must not be seen."""
    return {"parallel": t, "delay": t + k}.get(pattern, t * K + k)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_logit_sees_its_own_or_a_later_token(pattern):
    model = toy(pattern, (11, 7, 5, 11), scale=0.3)
    codes = codes_like(model, 1, 6)
    base, K = model(codes), 4
    for t, k in ((0, 0), (2, 1), (3, 3), (5, 2)):
        other = codes.clone()
        other[0, t, k] = (other[0, t, k] + 1) % model.vocab[k]
        changed = (model(other) - base).nan_to_num(0).abs().amax(-1)[0] > 0  # [T, K]
        for a in range(6):
            for b in range(K):
                before = order_of(pattern, a, b, K) <= order_of(pattern, t, k, K)
                assert not (before and changed[a, b]), (t, k, a, b)
        later = [(a, b) for a in range(6) for b in range(K)
                 if order_of(pattern, a, b, K) > order_of(pattern, t, k, K)]  # fmt: skip
        assert not later or any(changed[a, b] for a, b in later)  # and it is seen afterwards


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_nothing_and_costs_nothing(pattern):
    model = toy(pattern, scale=0.3)
    a, b = codes_like(model, 1, 5), codes_like(model, 1, 9, 1)
    both = torch.full((2, 9, 4), -1)
    both[0, :5], both[1] = a[0], b[0]
    assert torch.allclose(model(both)[0, :5], model(a)[0], atol=1e-5)
    none = model.rows(torch.full((1, 1, 4), -1))  # "no token" is a row of its own, never a real code
    assert (none >= sum(model.vocab)).all() and len(none.unique()) == 4
    loss, ce = token_lm.objective(model, both, model.sizes, torch.ones(4), 0.0, 14)
    parts = [token_lm.token_losses(model(c), c, model.sizes)[0].sum().item() for c in (a, b)]
    assert loss.item() == pytest.approx(sum(parts) / 14 / 4, rel=1e-5)
    assert ce.sum().item() == pytest.approx(sum(parts), rel=1e-5)


def test_objective_against_pytorch():
    model = toy("depth", (11, 7, 5, 9), scale=0.3)
    codes, w = codes_like(model, 2, 6), torch.tensor([1.0, 1.1, 1.3, 1.5])
    logits = model(codes)
    want = 0.0
    for k, v in enumerate(model.vocab):
        flat, target = logits[:, :, k, :v].reshape(-1, v), codes[:, :, k].reshape(-1)
        want += w[k] / w.sum() * torch.nn.functional.cross_entropy(flat, target, label_smoothing=0.05)
    got, _ = token_lm.objective(model, codes, model.sizes, w, 0.05, 12)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_no_decay_on_vectors_and_flops():
    model = toy("depth")
    assert {p.ndim for n, p in model.named_parameters() if "norm" in n or n == "start"} == {1}
    big = token_lm.TokenLM({"pattern": "parallel", "vocab": [64] * 9, "d_model": 64, "layers": 3, "heads": 2,
                            "depth_layers": 1, "depth_d_model": 64, "dropout": 0, "ctx": 8})  # fmt: skip
    weights = 3 * 12 * 64 * 64 + 9 * 64 * 64
    assert big.flops_per_frame(8) == pytest.approx(6 * weights + 6 * 3 * 64 * 8, rel=0.02)


def test_perplexity_and_bits():
    assert token_lm.summary([4.1932] * 9, 86.13)["ppl"] == pytest.approx(66.2, abs=0.05)
    bits = token_lm.summary([math.log(4096)] * 7, 24000 / 2048)
    assert bits["bits_per_frame"] == pytest.approx(84) and bits["bits_per_s"] == pytest.approx(984.4, abs=0.1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("S", [2, 7, 16])
def test_attention_over_few_positions_is_torchs(S, causal):
    """As it is called: views of one projection [B, S, 3, H, D], so not contiguous."""
    torch.manual_seed(S)
    found = []
    for attend in (token_lm.short_attention, torch.nn.functional.scaled_dot_product_attention):
        torch.manual_seed(S)
        qkv = torch.randn(5, S, 3, 3, 32, requires_grad=True)
        y = attend(*qkv.permute(2, 0, 3, 1, 4), is_causal=causal)
        (y * torch.randn(y.shape)).sum().backward()
        found.append((y.detach(), qkv.grad))
    for mine, torchs in zip(*found):
        assert mine.shape == torchs.shape and (mine - torchs).abs().max() < 1e-6 * torchs.abs().max()


# ---- sampling ----


@pytest.mark.parametrize("prompt", [0, 3, 20])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_sampling_equals_full_forward(pattern, prompt):
    model = toy(pattern, (11, 7, 5, 11), ctx=12, scale=0.3)
    seen = {}
    given = codes_like(model, 2, prompt) if prompt else None
    note = lambda t, k, logits, t0: seen.setdefault((t, k), (logits.clone(), t0))
    codes = token_lm.sample(model, 17, given, 2, temperature=1.0, seed=3, on_logits=note)
    assert codes.shape == (2, prompt + 17, 4) and (codes >= 0).all()
    assert (codes < torch.tensor(model.vocab)).all() and len(seen) == 17 * 4
    if prompt:
        assert torch.equal(codes[:, :prompt], given)
    for (t, k), (logits, t0) in seen.items():
        window = codes[:, t0 : t0 + 12].clone()
        if pattern == "delay":  # tokens that come later in the pattern's order are not there yet
            for a in range(window.shape[1]):
                for b in range(4):
                    if a + b >= t - t0 + k and not a + t0 < prompt:
                        window[:, a, b] = -1
        assert t - t0 < 12
        full = model(window)[:, t - t0, k]
        assert torch.allclose(logits, full, atol=2e-4), (t, k, t0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sampling_never_asks_a_tensor_for_a_number(pattern, monkeypatch):
    """On a GPU each such question waits for all that was begun."""
    model, asked = toy(pattern, ctx=6, scale=0.3), []
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu", "nonzero"):
        own = getattr(torch.Tensor, name)
        note = lambda self, *args, name=name, own=own: asked.append(name) or own(self, *args)
        monkeypatch.setattr(torch.Tensor, name, note)
    token_lm.sample(model, 10, codes_like(model, 1, 2), 1, temperature=0.9, top_k=3, top_p=0.9)
    assert not asked


def test_sampling_filters_and_seed():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    g = torch.Generator().manual_seed(0)
    assert (token_lm.pick(logits, 0, 0, 0, g) == 0).all()
    assert set(token_lm.pick(logits, 1.0, 2, 0, g).tolist()) == {0, 1}
    assert set(token_lm.pick(logits, 1.0, 0, 0.6, g).tolist()) == {0, 1}
    assert set(token_lm.pick(logits, 1.0, 0, 0.5, g).tolist()) == {0}
    counts = np.bincount(token_lm.pick(logits, 1.0, 0, 0, g), minlength=4) / 4000
    assert np.allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    hot = np.bincount(token_lm.pick(logits, 10.0, 0, 0, g), minlength=4) / 4000
    assert hot.max() < 0.32
    probs = logits.softmax(-1)
    theirs, ours = (torch.Generator().manual_seed(7) for _ in range(2))
    wanted = torch.multinomial(probs, 1, generator=theirs)[:, 0]
    assert torch.equal(token_lm.pick(logits, 1.0, 0, 0, ours), wanted)  # the same draws
    model = toy("depth", scale=0.3)
    assert torch.equal(token_lm.sample(model, 5, seed=1), token_lm.sample(model, 5, seed=1))
    assert not torch.equal(token_lm.sample(model, 5, seed=1), token_lm.sample(model, 5, seed=2))


# ---- learning ----


def fit(model, batch_at, steps, lr):
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for s in range(steps):
        for g in opt.param_groups:
            g["lr"] = train_rvq.lr_at(s, steps, lr, 0.05, 0.05)
        codes = batch_at(s)
        frames = codes.shape[0] * codes.shape[1]
        loss, _ = token_lm.objective(model, codes, model.sizes, torch.ones(model.K), 0.0, frames)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    model.eval()
    return model


@pytest.mark.parametrize("pattern", PATTERNS)
def test_copy_task(pattern):
    """c_k = (c_0 + 3 k) mod V: only a pattern that sees inside the frame can do better than ln V."""
    V, K = 8, 4
    model = toy(pattern, (V,) * K, ctx=12, d=32)

    def batch(s):
        g = torch.Generator().manual_seed(s)
        return (torch.randint(0, V, (16, 12, 1), generator=g) + 3 * torch.arange(K)) % V

    fit(model, batch, 100, 8e-3)
    with torch.no_grad():
        codes = torch.cat([batch(10_000 + i) for i in range(8)])
        ce = token_lm.token_losses(model(codes), codes, model.sizes)[0].mean().item()
    if pattern == "parallel":
        assert ce == pytest.approx(math.log(V), rel=0.03)
    else:
        assert math.log(V) / K * 0.98 < ce < math.log(V) / K * 1.10


def test_overfits_8_by_48_frames():
    model = toy("depth", (64,) * 4, ctx=48, d=64)
    codes = codes_like(model, 8, 48)
    fit(model, lambda s: codes, 120, 6e-3)
    with torch.no_grad():
        assert token_lm.token_losses(model(codes), codes, model.sizes)[0].mean() < 0.1


def test_guard_survives_nan_and_outlier():
    guard = token_lm.StepGuard(5)
    assert [guard.reason(2.0, 1.0) for _ in range(30)] == [None] * 30
    assert guard.reason(float("nan"), 1.0) == "non-finite" and guard.reason(2.0, float("inf")) == "non-finite"
    assert guard.reason(50.0, 1.0) == "outlier" and guard.running == pytest.approx(2.0)
    assert guard.reason(2.1, 1.0) is None and guard.in_a_row == 0 and guard.skipped == 3
    low = token_lm.StepGuard(5)
    low.running = 0.01
    assert low.reason(0.5, 1.0) is None  # an overfitted run is not an outlier of itself
    first = token_lm.StepGuard(5)
    assert first.reason(float("nan"), float("nan")) == "non-finite" and first.reason(7.0, 1.0) is None


def test_the_best_of_another_run_is_not_overwritten_where_nothing_else_is_left(tmp_path):
    save_checkpoint(tmp_path / "rvq_3cb_best.pt", {"global_step": 5, "args": {"lr": 0.1, "device": "cpu"}})
    start = lambda lr: token_lm.find_resume(
        tmp_path, "rvq_3cb", argparse.Namespace(resume=None, lr=lr, device="0"), None, print
    )
    assert start(0.1) is None  # the same options make it again
    with pytest.raises(UserError, match=r"rvq_3cb_best.pt of step 5 .*another --save_dir or --tag"):
        start(0.2)
