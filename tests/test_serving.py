"""snac48/serving.py: token ids of a language model, the function of Orpheus-style servers, the example."""

import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.chaos_api import put, tts

from snac48.codec import InputError
from snac48.serving import Converter, SpeechTokens, pcm16

BASE, END, PER = 128256, 128258, (1, 2, 4)
ORDER = [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3)]  # c0 c1 c2 c2 c1 c2 c2


def spoken(n, seed=0):
    """(codes [K] of [1, T_k], their ids frame by frame)."""
    g = torch.Generator().manual_seed(seed)
    codes = [torch.randint(64, (1, n * f), generator=g) for f in PER]
    frames = [[int(codes[k][0, t * PER[k] + i]) for k, i in ORDER] for t in range(n)]
    return codes, [[BASE + 10 + 64 * slot + c for slot, c in enumerate(frame)] for frame in frames]


def read(tokens, ids):
    parts = [tokens.push([i]) for i in ids]
    return [torch.cat(p, 1) for p in zip(*parts)]


def same(found, codes, kept):
    return all(torch.equal(a, torch.cat([c[:, t * f : (t + 1) * f] for t in kept], 1))
               for a, c, f in zip(found, codes, PER))  # fmt: skip


def test_ids_become_codes_however_they_arrive():
    codes, frames = spoken(5)
    ids = [i for frame in frames for i in frame]
    tokens = SpeechTokens(tts().geometry)
    assert same(read(tokens, ids), codes, range(5)) and tokens.counts == {"frames": 5}
    assert same(SpeechTokens(tts().geometry).push(ids), codes, range(5))
    shifted = SpeechTokens(tts().geometry, base=0, offset=0)
    assert same(shifted.push([i - BASE - 10 for i in ids]), codes, range(5))


@pytest.mark.parametrize("name, damage, kept, counts", [
    ("a slot missing", lambda f: f[1].pop(3), [0, 2, 3], {"dropped": 1}),
    ("a slot twice", lambda f: f[1].insert(3, f[1][2]), [0, 2, 3], {"dropped": 1}),
    ("a slot too many at the end", lambda f: f[1].append(f[1][6]), [0, 1, 2, 3], {}),
    ("the first slot missing", lambda f: f[2].pop(0), [0, 1, 3], {}),
    ("a frame cut short", lambda f: f.__setitem__(0, f[0][:4]), [1, 2, 3], {"dropped": 1}),
    ("a word of text", lambda f: f[1].insert(2, 512), [0, 1, 2, 3], {"foreign": 1}),
    ("an id behind the codes", lambda f: f[1].insert(2, BASE + 10 + 64 * 7), [0, 1, 2, 3], {"foreign": 1}),
    ("an end token early", lambda f: f[2].insert(0, END), [0, 1], {"after the end": 14}),
    ("an end token inside", lambda f: f[2].insert(3, END), [0, 1], {"after the end": 11, "unfinished": 3}),
    ("an unfinished frame", lambda f: f[3].__delitem__(slice(5, None)), [0, 1, 2], {"unfinished": 5}),
])  # fmt: skip
def test_what_models_really_emit_is_named_and_counted(name, damage, kept, counts):
    codes, frames = spoken(4)
    damage(frames)
    tokens = SpeechTokens(tts().geometry)
    found = read(tokens, [i for frame in frames for i in frame])
    tokens.finish()
    assert same(found, codes, kept)
    assert tokens.counts == {"frames": len(kept)} | counts


def test_a_bad_frame_may_end_the_speech():
    codes, frames = spoken(4)
    frames[1].pop(3)
    tokens = SpeechTokens(tts().geometry, bad="stop")
    assert same(tokens.push([i for frame in frames for i in frame]), codes, [0]) and tokens.ended
    assert tokens.counts == {"frames": 1, "dropped": 1, "after the end": 16}
    with pytest.raises(InputError, match="drop or stop"):
        SpeechTokens(tts().geometry, bad="skip")


def test_random_ids_never_fail():
    rng, tokens = random.Random(5), SpeechTokens(tts().geometry)
    ids = [rng.choice([rng.randrange(200000), BASE + 10 + rng.randrange(7 * 64), -5]) for _ in range(3000)]
    found = tokens.push(ids)
    assert len(found[0][0]) == tokens.counts["frames"] and len(found[2][0]) == 4 * tokens.counts["frames"]


def test_the_function_of_such_servers_gives_the_samples_of_one_pass():
    codes, frames = spoken(9)
    plain = [[i - BASE - 10 - 64 * slot for slot, i in enumerate(frame)] for frame in frames]
    buffer, convert = [], Converter(tts())
    for _ in range(2):  # a second utterance is noticed
        buffer, sent = [], []
        for frame in plain:
            buffer += frame
            if len(buffer) > 27:  # as they call it
                sent.append(convert(buffer[-28:], len(buffer)))
        assert [len(s) for s in sent[1:]] == [2 * 4096] * 5
    sent.append(convert.finish())
    wanted = np.frombuffer(pcm16(tts().decode(codes, ["48k"])[1]), "<i2").astype(int)
    assert np.abs(np.frombuffer(b"".join(sent), "<i2") - wanted).max() <= 1
    bad = [*plain[0][:6], 4096]
    assert convert([*bad, *plain[1]], 14) is None and convert.dropped == 1
    with pytest.raises(InputError, match="5 new frames, but multiframe holds 1"):
        convert(plain[0], 49)


def test_the_example_of_the_page_speaks_the_recorded_tokens(tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    example = next(c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "SpeechTokens" in c)
    assert example.count("\n") < 40
    (tmp_path / "speak.py").write_text(example)
    (tmp_path / "voice").mkdir()
    ids = [i for frame in spoken(20)[1] for i in frame]
    (tmp_path / "tokens.txt").write_text(" ".join(map(str, ids)))
    argv = [sys.executable, "speak.py", str(put("export", tmp_path / "voice")), "tokens.txt"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert re.search(r"first sound after [\d.]+ s", done.stdout) and re.search(r"rtf [\d.]+", done.stdout)
    recorded = (ROOT / "assets" / "speech_tokens.txt").read_text().split()
    whole = [(int(i) - BASE - 10) // 4096 for i in recorded if int(i) != END]
    assert len(whole) % 7 == 0 and whole == [*range(7)] * (len(whole) // 7) and len(whole) > 200
