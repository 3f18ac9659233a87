"""snac48/publish.py: the exported folder, its card, and the way to the model hub and back."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_snac, run, save_snac, voice
from helpers import hub as stand_in

from snac48 import publish
from snac48.checkpoint import save_checkpoint
from snac48.cli import UserError
from snac48.codec import geometry_of, load_snac, model_config
from snac48.decoder import DualHeadDecoder, load_dual_head


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint, the codec of its codes, and the table of an evaluation beside it."""
    folder = tmp_path_factory.mktemp("trained")
    save_snac(make_snac(), folder / "codec")
    snac = load_snac(str(folder / "codec"))
    geometry = vars(geometry_of(snac, str(folder / "codec"))) | {"vq_strides": [4, 2, 1]}
    state = {"model": DualHeadDecoder(make_snac()).state_dict(), "model_config": model_config(snac)}
    state |= {"geometry": geometry, "global_step": 70, "args": {"recipe": "phase12"}, "best": {"loss": 1.5}}
    save_checkpoint(folder / "best_model.pt", state)
    (folder / "evaluation_results.md").write_text("| system | lsd |\n|---|---|\n| ours_48k | 1.14 |\n")
    return folder / "best_model.pt"


def codes():
    g = torch.Generator().manual_seed(3)
    return [torch.randint(64, (1, 6 * f), generator=g) for f in (1, 2, 4)]


def test_the_folder_holds_all_that_a_server_needs(trained, tmp_path):
    told = publish.export(str(trained), str(tmp_path / "out"))
    assert (
        sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(publish.FILES)
        and "load_dual_head" in told
    )
    here, there = load_dual_head(trained), load_dual_head(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(here.decode(codes()), there.decode(codes())))
    audio = torch.from_numpy(voice(0.5, 24000, 1))[None, None]
    found = here.encode(audio)
    (tmp_path / "out").rename(tmp_path / "moved")  # and nothing else of this machine
    there = load_dual_head(tmp_path / "moved")
    assert all(torch.equal(a, b) for a, b in zip(found, there.encode(audio)))
    card = (tmp_path / "moved" / "README.md").read_text()
    assert card.startswith("---\n") and "license: other" in card and "| ours_48k | 1.14 |" in card
    assert card.count("TODO") >= 3 and "| recipe | phase12 |" in card and "| steps | 70 |" in card
    (tmp_path / "moved" / "README.md").write_text("mine now")
    publish.export(str(trained), str(tmp_path / "moved"))
    assert (tmp_path / "moved" / "README.md").read_text() == "mine now"
    (tmp_path / "moved" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.txt.*empty folder"):
        publish.export(str(trained), str(tmp_path / "moved"))


SERVER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("snac48", "pyarrow", "soundfile", "soxr", "train_dual_head", "infer"):
            raise ImportError(f"{name} is not on this server")

sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
import numpy, torch
from decoder import load_dual_head

codes = [torch.from_numpy(c) for c in numpy.load(sys.argv[2]).values()]
tts = load_dual_head(sys.argv[1])
stream = tts.open_stream()
pieces = [stream.push([c[:, i * f : (i + 1) * f] for c, f in zip(codes, (1, 2, 4))]) for i in range(9)]
audio = [torch.cat(p, -1) for p in zip(*pieces, stream.finish())]
assert all((a - b).abs().max() < 1e-5 for a, b in zip(audio, tts.decode(codes)))
numpy.savez(sys.argv[3], *(x.numpy() for x in audio))
"""


def test_the_folder_opens_where_nothing_of_ours_is(trained, tmp_path):
    """By its own code: no library of ours, no reader of audio or parquet, -I: no path."""
    publish.export(str(trained), str(tmp_path / "out"))
    np.savez(tmp_path / "codes.npz", *(torch.cat([c, c[:, : len(c[0]) // 2]], 1).numpy() for c in codes()))
    argv = [tmp_path / "out", tmp_path / "codes.npz", tmp_path / "audio.npz"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-I", "-c", SERVER, *map(str, argv)], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    given = [torch.from_numpy(c) for c in np.load(tmp_path / "codes.npz").values()]
    served = np.load(tmp_path / "audio.npz").values()
    for mine, theirs in zip(load_dual_head(trained).decode(given), served, strict=True):
        assert np.abs(mine.numpy() - theirs).max() < 1e-5 and np.abs(theirs).max() > 1e-3


def test_without_the_codec_the_export_decodes_and_says_so(trained, tmp_path):
    other = save_snac(make_snac(5), tmp_path / "other")
    told = publish.export(str(trained), str(tmp_path / "out"), pretrained_model=str(other))
    assert "without the encoder" in told and "not the codec" in told
    assert not (tmp_path / "out" / "encoder.safetensors").exists()
    load_dual_head(tmp_path / "out").decode(codes())


def test_to_the_hub_and_back(trained, tmp_path):
    """By the real client, over HTTP; the stand-in holds what was sent."""
    publish.export(str(trained), str(tmp_path / "out"))
    env = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    with stand_in.serving() as hub:
        env |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": ""}
        code = f"""if True:
            import os, sys, torch
            sys.path.insert(0, {str(ROOT)!r})
            from snac48 import publish
            from snac48.cli import UserError
            from snac48.decoder import load_dual_head
            def told(*how, **more):
                try:
                    return publish.push({str(tmp_path / "out")!r}, *how, **more)
                except UserError as e:
                    return f"refused: {{e}}"
            print(told("me/voice"))
            os.environ["HF_TOKEN"] = "hf_wrong"
            print(told("me/voice"))
            os.environ["HF_TOKEN"] = {stand_in.TOKEN!r}
            print(told("voice"))
            first = told("me/voice")
            print(first)
            print(told("me/voice"))
            print(told("me/voice", overwrite=True))
            tts = load_dual_head(first.split("'")[1])
            codes = [torch.ones(1, 3 * f, dtype=torch.long) for f in (1, 2, 4)]
            here = load_dual_head({str(tmp_path / "out")!r})
            print(all(torch.equal(a, b) for a, b in zip(tts.decode(codes), here.decode(codes))))
            audio = torch.sin(torch.arange(9000.0))[None, None]
            print(all(torch.equal(a, b) for a, b in zip(tts.encode(audio), here.encode(audio))))
        """
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "needs a token" in lines[0] and "did not take me/voice" in lines[1] and "OWNER/NAME" in lines[2]
    assert "sent to me/voice (private)" in lines[3] and "holds a model already: --overwrite" in lines[4]
    assert "sent to me/voice" in lines[5] and lines[6:] == ["True", "True"]
    assert hub.repos["me/voice"]["private"]
    assert set(publish.FILES) <= set(hub.repos["me/voice"]["commits"][-1][1])


def test_push_needs_a_folder_to_send(trained):
    done = run("infer.py", "--checkpoint", trained, "--push", "me/voice", code=2)
    assert "--export DIR" in done.stderr
