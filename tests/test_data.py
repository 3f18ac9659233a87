"""snac48/data.py: targets, slices whose codes and audio match exactly, batches."""

import json
import pickle
import shutil

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import call, one_sentence, run, voice
from helpers.training import cached, metrics, raw, recipe_args, recipe_training

import precompute_48k
import train_dual_head as T
from snac48.audio import read_audio, resample
from snac48.cli import UserError
from snac48.codec import slice_at
from snac48.data import CachedCodesDataset, Filler, batches, loader, to_device
from snac48.losses import head_losses
from snac48.schedule import Epoch, epoch_order


def test_every_row_once_an_epoch_whatever_ranks_and_micro_batches():
    order = epoch_order(42, 3, 101)
    epoch = Epoch(3, "main", 1.0, 8, 100, 13)

    def rows(ranks):
        return sorted(i for lists in ranks for part in lists for i in part if not isinstance(i, Filler))

    for world, accum in ((1, 1), (2, 1), (3, 2), (1, 4)):
        ranks = [list(batches(order, epoch, 100, r, world, accum)) for r in range(world)]
        assert all(len(lists) == 13 * accum for lists in ranks)
        assert rows(ranks) == list(range(101))
        resumed = [batches(order, epoch, 105, r, world, accum) for r in range(world)]
        assert rows(resumed) == sorted(order[40:])


# ---- a cache ----


def test_batches_hold_codes_and_audio_of_exactly_matching_place_and_length(
    cache_dir, targets_dir, audio_dir, snac
):
    data = CachedCodesDataset(cache_dir, targets_dir, 0.5)
    data.set_epoch(3)
    assert len(data) == 14 and data.coarse_len == 5
    batch = to_device(data[list(range(14))], "cpu")
    assert [c.shape for c in batch["codes"]] == [(14, 5), (14, 10), (14, 20)]
    assert batch["audio_24k"].shape == (14, 1, 5 * 2048) and batch["audio_48k"].shape == (14, 1, 10 * 2048)
    for i in range(14):
        at = slice_at(int(batch["start"][i]), 5, 512, (4, 2, 1))
        x, rate = read_audio(audio_dir / data.path(i))
        codes = snac.encode(torch.from_numpy(resample(x, rate, 24000))[None, None])
        for k in range(3):
            a = at["scale_start"][k]
            assert torch.equal(batch["codes"][k][i], codes[k][0, a : a + at["scale_len"][k]])
        for name, r, f in (("24k", 24000, 1), ("48k", 48000, 2)):
            audio, valid = batch[f"audio_{name}"][i, 0].numpy(), f * int(batch["valid_24k"][i])
            whole = resample(x, rate, r)[f * at["start_sample_24k"] :][:valid]
            assert np.abs(audio[: len(whole)] - whole).max() < 3e-3  # mp3/ogg sources clip at 16 bits
            assert not audio[valid:].any()


def test_24_kHz_audio_made_on_the_device_has_the_samples_of_the_resampled_whole(codes_48k, speech_48k):
    """Everywhere, at both ends of the recordings, too: within 1e-6 of full scale, a 30th of a 16-bit step."""
    for segment in (0.3, 4.0):
        data = CachedCodesDataset(codes_48k, speech_48k, segment, target_kind="recordings")
        batch = data[list(range(12))]
        assert "audio_24k" not in batch and batch["halve"].all()
        batch = to_device(batch, "cpu")
        for i in range(12):
            x, _ = read_audio(speech_48k / data.path(i))
            first, valid = 2048 * int(batch["start"][i]), int(batch["valid_24k"][i])
            whole = resample(x, 48000, 24000)[first : first + valid]
            found = batch["audio_24k"][i, 0].numpy()
            assert np.abs(found[:valid] - whole).max() < 1e-6 and not found[valid:].any()
            part = x[2 * first :][: 2 * valid]
            assert np.array_equal(batch["audio_48k"][i, 0].numpy()[: len(part)], part)


def test_rows_of_one_file_and_of_two_share_a_batch(cache_dir, targets):
    """Restored targets leave the 24 kHz audio to the recording, copied ones hold it."""
    folder, rows = targets
    separate = CachedCodesDataset(cache_dir, folder, 0.5)
    for row in rows[::2]:
        row["kind"] = "sidon"
    write_manifest(folder, rows)
    mixed = CachedCodesDataset(cache_dir, folder, 0.5)
    a, b = mixed[list(range(14))], separate[list(range(14))]
    assert a["halve"].sum() == 7 and "audio_24k" in a and b["halve"].all()
    a, b = to_device(a, "cpu"), to_device(b, "cpu")
    assert torch.equal(a["audio_48k"], b["audio_48k"]) and torch.equal(a["start"], b["start"])
    error = (a["audio_24k"] - b["audio_24k"]).abs().amax((1, 2))
    assert error.max() < 3e-3 and (error[[int(r) for r in torch.where(~a["phase_true"])[0]]] > 0).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_batches_in_their_order_and_never_changes_them_later(
    codes_48k, speech_48k, workers
):
    """Workers use their shared memory again: all batches are held until the end, then compared."""
    data = CachedCodesDataset(codes_48k, speech_48k, 0.3, target_kind="recordings")
    draw = np.random.default_rng(0)
    lists = [draw.integers(0, 12, draw.integers(1, 6)).tolist() for _ in range(60)]
    lists[1:3] = [0, Filler(5)], [Filler(2)]
    found = list(loader(data, iter(lists), workers, pin_memory=False))
    assert [batch["rows"] for batch in found[:3]] == [lists[0], [0], []]
    assert [batch["valid_24k"].tolist() for batch in found[1:3]] == [[3 * 2048, 0], [0]]
    for batch, indices in zip(found, lists, strict=True):
        direct = data[indices]
        assert batch.keys() == direct.keys()
        assert all(torch.equal(batch[k], direct[k]) for k in direct if torch.is_tensor(direct[k]))
        assert all(torch.equal(a, b) for a, b in zip(batch["codes"], direct["codes"], strict=True))


def test_a_spawned_worker_opens_the_tables_itself(cache_dir, targets_dir):
    data = CachedCodesDataset(cache_dir, targets_dir, 0.5, audio_24k_dir=None)
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    a, b = data[[0, 5, 13]], pickle.loads(pickled)[[0, 5, 13]]
    assert all(torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k]))


def test_crops_change_with_epoch_and_seed_and_validation_crops_never_do(
    codes_48k, speech_48k, snac_dir, tmp_path
):
    def crops(data):
        found = []
        for epoch in (1, 2, 3):
            data.set_epoch(epoch)
            batch = data[list(range(len(data)))]
            found.append([*batch["start"].tolist(), *batch["noise_key"].tolist()])
        return found

    data = cached(codes_48k, speech_48k)
    a, b = (recipe_training("phase11-fast", snac_dir, tmp_path / n, *data).run for n in "ab")
    c = recipe_training("phase11-fast", snac_dir, tmp_path / "c", *data, "--seed", 7).run
    one, again, other = (crops(run.data) for run in (a, b, c))
    assert one == again and one != other
    assert one[0] != one[1] != one[2] != one[0]
    fixed = crops(a.val)
    assert fixed[0] == fixed[1] == fixed[2]


def test_a_short_utterance_is_masked_not_padded_with_a_real_code(cache_dir, targets_dir):
    batch = to_device(CachedCodesDataset(cache_dir, targets_dir, 4.0)[[0]], "cpu")  # 1.0 s long
    assert (batch["codes"][0] == -1).sum() > 20 and batch["valid_24k"].tolist() == [24000]
    for audio, n in ((batch["audio_24k"][0, 0], 24000), (batch["audio_48k"][0, 0], 48000)):
        assert not audio[n:].any() and audio[:n].any()


@pytest.fixture
def targets(targets_dir, tmp_path):
    """(a copy of the targets, the rows of its manifest)"""
    folder = shutil.copytree(targets_dir, tmp_path / "targets")
    return folder, [json.loads(line) for line in open(folder / "manifest.jsonl")]


def write_manifest(folder, rows):
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_48k_folder_that_lacks_files_says_how_many_and_which_first(cache_dir, targets):
    folder, rows = targets
    write_manifest(folder, [r for r in rows if "utt03" not in r["path"]])
    (folder / "a" / "utt00.wav").unlink()  # in the manifest, not on the disk
    with pytest.raises(UserError, match=r"lacks 2 of 14 files, first a/utt00.wav"):
        CachedCodesDataset(cache_dir, folder, 1.0)
    data = CachedCodesDataset(cache_dir, folder, 1.0, max_bad_fraction=0.5)
    assert len(data) == 12 and data.left_out == {"no 48 kHz target": 2}


def test_unfaithful_rows_are_left_out_and_counted(cache_dir, targets):
    folder, rows = targets
    rows[4]["faithful"] = False
    write_manifest(folder, rows)
    data = CachedCodesDataset(cache_dir, folder, 1.0)
    assert len(data) == 13 and data.left_out == {"unfaithful 48 kHz target": 1}
    assert len(CachedCodesDataset(cache_dir, folder, 1.0, include_unfaithful=True)) == 14


def test_a_vanished_target_is_an_error_item_not_silence(cache_dir, targets):
    data = CachedCodesDataset(cache_dir, targets[0], 0.5)
    (targets[0] / "a" / "utt02.wav").unlink()
    batch = to_device(data[[2]], "cpu")
    assert batch["bad_file"] == [("a/utt02.ogg", "file not found")] and batch["valid_24k"].tolist() == [0]
    audio = torch.ones(1, 1, 5 * 2048), torch.ones(1, 1, 10 * 2048)
    assert all(float(v) == 0 for v in head_losses(audio, batch, {"l1": 1.0, "stft": 1.0}).values())


def test_a_target_that_was_scaled_to_fit_16_bits_comes_back_at_its_level(cache_dir, targets_dir, targets):
    folder, rows = targets
    x, _ = sf.read(folder / rows[0]["target"])
    sf.write(folder / rows[0]["target"], x * 0.5, 48000, subtype="PCM_16")
    rows[0]["level"] = 0.5
    write_manifest(folder, rows)
    a, b = (to_device(CachedCodesDataset(cache_dir, d, 0.5)[[0]], "cpu") for d in (targets_dir, folder))
    assert torch.allclose(a["audio_48k"], b["audio_48k"], atol=1e-4)
    assert torch.allclose(a["audio_24k"], b["audio_24k"], atol=1e-4) and a["audio_24k"].abs().max() > 0.05


# ---- recordings, encoded and restored on the fly ----


@pytest.mark.parametrize("recipe", ["phase11-fast", "phase12", "phase10"])
def test_cached_and_raw_path_give_the_same_loss(recipe, speech_48k, codes_48k, snac_dir, tmp_path):
    first, codes = {}, []
    for name, data in (("cache", cached(codes_48k, speech_48k)), ("raw", raw(speech_48k))):
        t = recipe_training(recipe, snac_dir, tmp_path / name, *data)
        t.run.data.set_epoch(1)
        t.run.data.set_segment_length(0.5)
        order = epoch_order(42, 1, len(t.run.data))[:6]
        batch = T.prepare(t.run, t.state, t.run.data[order.tolist()])
        losses = T.losses_of(t.run, t.state, t.state.model, batch)[0]
        first[name] = {k: float(v.detach().mean()) for k, v in losses.items()} | {
            "val": T.validate(t.run, t.state)["loss"]
        }
        codes.append(batch["codes"])
    assert all(torch.equal(a, b) for a, b in zip(*codes))
    assert first["cache"] == pytest.approx(first["raw"], rel=1e-5)


def test_raw_recordings_below_the_native_rate_need_an_upsampler(snac_dir, tmp_path):
    low = tmp_path / "low"
    low.mkdir()
    for i in range(4):
        sf.write(low / f"{i}.wav", voice(1.0, 22050, i), 22050)
    argv = recipe_args("phase11-standard", snac_dir, tmp_path / "run", *raw(low))
    done = run("train_dual_head.py", *argv, code=5)
    assert "22050 Hz is below --native_rate 48000" in one_sentence(done)
    t = recipe_training("phase11-standard", snac_dir, tmp_path / "sinc", *raw(low), "--upsampler", "sinc")
    batch = t.run.data[[0]]
    assert batch["phase_true"].all() and batch["audio_48k"].abs().max() > 0.01
    done = run("train_dual_head.py", *argv, "--upsampler", "sidon", "--sidon_dir", low, code=1)
    assert "feature_extractor_cpu.pt" in one_sentence(done)


def test_a_recording_far_over_full_scale_is_left_out_by_name_and_teaches_nothing(snac_dir, tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    for i in range(4):
        x = voice(1.0, 48000, i)
        sf.write(folder / f"{i}.wav", x * (40 / np.abs(x).max() if i == 2 else 1), 48000, subtype="FLOAT")
    t = recipe_training("phase12", snac_dir, tmp_path / "run", *raw(folder))
    assert (t.run.data[[0, 1, 2, 3]]["valid_24k"] > 0).tolist() == [True, True, False, True]
    assert t.train() == 0 and not t.state.bad_files
    (event,) = metrics(tmp_path / "run", "left_out")
    assert event["file_path"] == "2.wav" and "where full scale is 1" in event["reason"]
    assert max(v["loss"] for v in metrics(tmp_path / "run", "val")) < 50


def test_sidon_on_the_fly_gives_the_targets_that_precompute_writes(sidon_dir, snac_dir, tmp_path):
    low = tmp_path / "low"
    low.mkdir()
    for i in range(3):
        sf.write(low / f"{i}.wav", voice(1.2 + 0.3 * i, 24000, i), 24000)
    call(precompute_48k, "--input_dir", low, "--output_dir", tmp_path / "targets", "--sidon_dir", sidon_dir,
         "--device", "cpu", "--num_workers", 0, "--min_envelope_corr", 0.0)  # fmt: skip
    written = ["--audio_48k_dir", tmp_path / "targets", "--val_audio_48k_dir", tmp_path / "targets"]
    flying = ["--upsampler", "sidon", "--sidon_dir", sidon_dir]

    def prepared(name, *more):
        t = recipe_training("phase11-warmup", snac_dir, tmp_path / name, *raw(low), *more)
        return T.prepare(t.run, t.state, t.run.data[[0, 1, 2]]), t.state.unfaithful

    any_corr = "--min_envelope_corr", 0, "--include_unfaithful"
    (a, _), (b, _) = prepared("a", *written, *any_corr), prepared("b", *flying, *any_corr)
    assert not a["phase_true"].any() and not b["phase_true"].any()
    assert a["audio_48k"].abs().max() > 0.01
    assert torch.allclose(a["audio_48k"], b["audio_48k"], atol=2 / 32768)
    masked, unfaithful = prepared("strict", *flying, "--min_envelope_corr", 1)
    assert (masked["valid_24k"] == 0).all() and len(unfaithful) == 3


def test_a_48k_folder_without_a_manifest_must_say_what_it_holds(codes_48k, speech_48k):
    """SIDON's output taken for recordings would be trained as phase-true."""
    with pytest.raises(UserError, match="--target_kind sidon"):
        CachedCodesDataset(codes_48k, speech_48k, 0.3)
    for kind, true in (("recordings", True), ("sidon", False)):
        data = CachedCodesDataset(codes_48k, speech_48k, 0.3, target_kind=kind)
        assert data[[0, 1]]["phase_true"].tolist() == [true, true]
