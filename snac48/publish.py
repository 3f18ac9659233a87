"""A trained decoder for others: the exported folder, its model card, and the way onto the model hub.

model.safetensors  weights of quantizer, trunk and heads
encoder.safetensors  the codec's encoder, where it was at hand: recordings can be encoded, too
config.json        SNAC's arguments, the geometry of the codes, the SHA-256 of the weights
*.py               the code that opens the folder beside torch, numpy, safetensors and snac
README.md          the model card; what only its author knows is marked TODO
"""

import shutil
from pathlib import Path

import torch

from . import codec
from .checkpoint import load_checkpoint
from .cli import UserError, first_line
from .decoder import HEADS, read_checkpoint
from .files import atomic_file, write_json

CODE = ("codec.py", "decoder.py", "streaming.py")
FILES = ("model.safetensors", "encoder.safetensors", "config.json", *CODE, "README.md")


def export(checkpoint: str, folder: str, half: bool = False, pretrained_model: str = "") -> str:
    """Write the folder; of a codec that phase10 has trained, SNAC's own pytorch_model.bin and config.json,
    for --pretrained_model. pretrained_model: where the encoder is, when not where the training found it.
    Returns what to tell. Raises UserError."""
    state, config, geometry = read_checkpoint(checkpoint)
    codec.check_finite(state, checkpoint)
    out = Path(folder)
    claim(out)
    if any(k.startswith("encoder.") for k in state):
        trunk_layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("trunk."))
        whole = {snac_name(k, trunk_layers): as_stored(k, v, half) for k, v in state.items()}
        torch.save(whole, out / "pytorch_model.bin")
        write_json(out / "config.json", config)
        return f"wrote a SNAC codec into {folder}; open it with --pretrained_model {folder}"
    encoder, missing = encoder_of(pretrained_model or geometry["pretrained_model"], state, geometry)
    (out / "encoder.safetensors").unlink(missing_ok=True)
    for name, weights in (("model", state), ("encoder", encoder)):
        if weights:
            write_weights(out / f"{name}.safetensors", weights)
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), out / name)
    sha = codec.file_hash(out / "model.safetensors")
    write_json(out / "config.json", {"model_config": config, "geometry": geometry, "weights_sha256": sha})
    if not (out / "README.md").exists():  # its author has written into it
        (out / "README.md").write_text(card(checkpoint, state, geometry), encoding="utf-8")
    without = f"; without the encoder ({missing})" if missing else ""
    names = ", ".join(name for name in FILES if (out / name).is_file())
    return f"wrote {names} into {folder}{without}; open it with load_dual_head({folder!r})"


def claim(out: Path) -> None:
    """Make the folder; what is in it must be an earlier export. Raises UserError."""
    out.mkdir(parents=True, exist_ok=True)
    ours = (*FILES, "pytorch_model.bin", "__pycache__")
    others = sorted(p.name for p in out.iterdir() if p.name not in ours)
    if not others and (out / "README.md").exists() and not (out / "config.json").exists():
        others = ["README.md"]
    if others:
        raise UserError(
            f"--export {out} holds {others[0]}, which no export has written: name an empty folder"
        )


def write_weights(path: Path, weights: dict) -> None:
    from safetensors.torch import save

    with atomic_file(path) as f:  # safetensors' own save_file lets nobody else read it
        f.write(save({k: v.contiguous().clone() for k, v in weights.items()}))


def encoder_of(name: str, state: dict, geometry: dict) -> tuple[dict, str]:
    """(weights of the encoder that made this decoder's codes, "") or ({}, why it can't be had)."""
    try:
        snac = codec.load_snac(name)
    except UserError as e:
        return {}, str(e)
    encoder = {f"encoder.{k}": v for k, v in snac.encoder.state_dict().items()}
    quantizer = {k: v for k, v in state.items() if k.startswith("quantizer.")}
    if codec.weights_hash(encoder | quantizer) != geometry["weights_sha256"]:
        return {}, f"{name} is not the codec that this decoder was trained with"
    return {k.removeprefix("encoder."): v for k, v in encoder.items()}, ""


def snac_name(key: str, trunk_layers: int) -> str:
    """Our name of a weight -> SNAC's: trunk.3.x is decoder.model.3.x, and head_24k the layers that follow."""
    part, _, rest = key.partition(".")
    at, _, tail = rest.partition(".")
    if part not in ("trunk", "head_24k"):
        return key
    return f"decoder.model.{int(at) + (trunk_layers if part == 'head_24k' else 0)}.{tail}"


def as_stored(key: str, weight, half: bool):
    """A codec's weight for the file. half: as float16, which SNAC.from_pretrained casts back; one that came
    as float16 and has not changed (a frozen encoder's) stays so anyway: caches made with it stay valid."""
    exact = torch.equal(weight.half().float(), weight.float())
    if half and not exact and key.endswith("weight.original1"):
        # the direction of a weight-normed row at length 1: a shorter one could become 0 and have none
        weight = torch.nn.functional.normalize(weight.flatten(1), eps=1e-30).view_as(weight)
    return (weight.half() if half or exact else weight).clone()


# ---- the card ----

CARD = """---
library_name: pytorch
pipeline_tag: text-to-speech
tags: [audio, speech, neural-codec, snac, "48khz"]
license: other
license_name: TODO
{base}---

# {rates} speech from SNAC tokens

A decoder for the tokens of the neural codec [SNAC](https://github.com/hubertsiuzdak/snac) at 24 kHz. The
tokens, and language models that speak them, stay as they are; out come {rates}.

    from huggingface_hub import snapshot_download
    folder = snapshot_download("OWNER/NAME", revision="COMMIT")  # or this folder
    import sys; sys.path.insert(0, folder)
    from decoder import load_dual_head
    tts = load_dual_head(folder, device="cuda:0")
    audio_24k, audio_48k = tts.decode(codes)    # codes: [c0, c1, c2] of [B, T], [B, 2T], [B, 4T]
    stream = tts.open_stream()                  # push(codes) -> samples, finish()

It needs torch, numpy, safetensors and snac {snac}.

## Trained on

TODO: which recordings (languages, speakers, hours, sources, licences).

{training}

## Evaluation

{evaluation}

## Licence

TODO: the licence of these weights. They were trained on the recordings above, from the weights of
{pretrained}; both have licences of their own.
"""


def card(checkpoint: str, state: dict, geometry: dict) -> str:
    """The text of README.md."""
    from importlib.metadata import version

    saved = load_checkpoint(checkpoint)
    args, versions = saved.get("args", {}), saved.get("versions", {})
    told = {"recipe": args.get("recipe"), "steps": saved.get("global_step"), "epochs": saved.get("epoch"),
            "segment, s": saved.get("segment_length"), "best validation losses": saved.get("best"),
            "code": versions.get("git"), "torch": versions.get("torch")}  # fmt: skip
    rows = [f"| {k} | {v} |" for k, v in told.items() if v is not None]
    name = geometry["pretrained_model"]
    heads = [head for head in HEADS if any(k.startswith(f"head_{head}.") for k in state)]
    return CARD.format(
        base=f"base_model: {name.partition('@')[0]}\n" if on_hub(name) else "",
        rates=" and ".join(f"{HEADS[head].rate // 1000} kHz" for head in heads),
        snac=version("snac"),
        training="\n".join(["| | |", "|---|---|", *rows]),
        evaluation=evaluation(Path(checkpoint)) or "TODO: `evaluate.py --checkpoint …` writes the table.",
        pretrained=name if on_hub(name) else f"a SNAC ({Path(name).name})",
    )


def on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()


def evaluation(checkpoint: Path) -> str:
    """The tables of evaluate.py's page beside the checkpoint, or one folder above, as the demo has it."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        page = folder / "evaluation_results.md"
        if page.is_file():
            lines = page.read_text(encoding="utf-8").splitlines()
            return "\n".join(
                f"#{line}" if line.startswith("## ") else line for line in lines if line[:2] != "# "
            )
    return ""


# ---- the hub ----


def push(folder: str, repo: str, public: bool = False, overwrite: bool = False) -> str:
    """Send an exported folder to the model hub; returns what to tell. Raises UserError: no token, a model
    that is there already (unless `overwrite`), a hub that says no."""
    from huggingface_hub import HfApi, constants, get_token

    if repo.count("/") != 1:
        raise UserError(f"--push {repo}: a model on the hub is named OWNER/NAME")
    if not get_token():
        raise UserError("--push needs a token of the model hub: set HF_TOKEN, or run `hf auth login` once")
    api = HfApi(library_name="snac48")
    try:
        there = api.repo_exists(repo) and api.list_repo_files(repo)
        if set(there or ()) - {".gitattributes"} and not overwrite:
            raise UserError(f"{repo} holds a model already: --overwrite replaces it (older commits stay)")
        api.create_repo(repo, private=not public, exist_ok=True)
        sent = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(FILES),
                                 commit_message="A dual-head SNAC decoder")  # fmt: skip
    except UserError:
        raise
    except Exception as e:  # of the hub's client and of HTTP: many classes, one meaning
        raise UserError(f"{constants.ENDPOINT} did not take {repo}: {first_line(e)}") from None
    kind = "public" if public else "private"
    return f"sent to {repo} ({kind}); open it with load_dual_head({f'{repo}@{sent.oid}'!r})"
