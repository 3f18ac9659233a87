"""Checkpoints: written whole, verified before they are believed."""

import os
import re
import zipfile
from pathlib import Path

from .cli import UserError, first_line, warn
from .files import atomic_file


def save_checkpoint(path: str | Path, state: dict) -> None:
    """torch.save through a temporary file: `path` is always a whole checkpoint, old or new."""
    import torch

    try:
        with atomic_file(path) as f:
            torch.save(state, f)
    except OSError as e:
        raise UserError(
            f"checkpoint {path} could not be written: {e.strerror}; free some space or choose "
            "another --output_dir, then --resume the previous checkpoint"
        ) from e
    except RuntimeError as e:  # torch's zip writer reports a full disk this way
        if not any(word in str(e) for word in ("write", "PytorchStreamWriter", "inline_container")):
            raise
        raise UserError(
            f"checkpoint {path} could not be written (disk full?): {str(e).splitlines()[0]}; "
            "free some space, then --resume from the previous checkpoint"
        ) from e


def restore_optimizer(optimizer, saved: dict) -> None:
    """load_state_dict with the options of this run: rates and moments come from the checkpoint, while fused,
    foreach, capturable, weight decay and betas stay as `optimizer` was built. Torch reads these flags to
    decide where `step` must lie (fused: on the parameter's device), so they are set before it loads.

    saved: optimizer.state_dict(). Raises ValueError where groups or parameters differ.
    """
    own = optimizer.state_dict()["param_groups"]
    options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in own]
    groups = [group | mine for group, mine in zip(saved["param_groups"], options, strict=True)]
    optimizer.load_state_dict(saved | {"param_groups": groups})


def check_zip(path: Path) -> str | None:
    """Reason why a torch checkpoint is damaged, or None. torch.load never checks the zip's CRCs."""
    try:
        with zipfile.ZipFile(path) as z:
            for entry in z.infolist():  # torch.save stores plainly; inflating could also fill the memory
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    return f"{entry.filename} is compressed or encrypted"
            broken = z.testzip()
        return f"CRC error in {broken}" if broken else None
    except Exception as e:  # a flipped bit in a header can make zipfile raise nearly anything
        return first_line(e)


def load_checkpoint(path: str | Path, map_location="cpu") -> dict:
    """Verified, `weights_only=True` (a pickle that would run code is refused), dense tensors only. Raises
    UserError naming the file and the reason."""
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    if reason := check_zip(path):
        raise UserError(f"checkpoint {path} is damaged ({reason}); use an older one from {path.parent}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:
        reason = first_line(e)
        if "weights_only" in str(e):  # torch goes on to say how to run the code all the same
            named = re.search(r"Unsupported (?:global: GLOBAL|class|operand) ([\w.]+)", str(e))
            what = f" ({named[1]})" if named else ""
            reason = f"it holds more than tensors and numbers{what} and could run code"
        raise UserError(f"checkpoint {path} was refused: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a dict")

    todo, seen = [("state", state)], set()
    while todo:  # no recursion: a pickle may nest as deep as it likes, or hold itself
        where, value = todo.pop()
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
                kind = "nested" if value.is_nested else "empty" if value.is_meta else value.layout
                raise UserError(f"checkpoint {path}: {where} is a {kind} tensor; only dense ones are read")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"checkpoint {path}: {where} claims {value.numel()} numbers and holds fewer")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{where[:200]}.{k}", v) for k, v in items]
    return state


# ---- what a checkpoint of train_dual_head.py has: to be opened, and to be resumed ----

OPENED = ("model", "geometry", "model_config", "args", "global_step")
RESUMED = (*OPENED, "optimizer", "scheduler", "ema", "validated_epoch", "phase", "guard", "best", "codes")


def require(saved: dict, path, keys=OPENED) -> dict:
    """`saved`, or a UserError where it lacks what a checkpoint of train_dual_head.py has."""
    missing = [k for k in keys if k not in saved]
    if {"geometry", "model_config"} <= set(missing) and {"model", "model_state_dict"} & set(saved):
        raise UserError(
            f"{path} is a checkpoint of older scripts (it holds {', '.join(list(saved)[:6])}): it can't be "
            "resumed or decoded here; where its model is a whole SNAC, save that as pytorch_model.bin beside "
            "its codec's config.json and give the folder as --pretrained_model"
        )
    if missing:
        raise UserError(f"{path} is not a checkpoint of train_dual_head.py: it lacks {', '.join(missing)}")
    if not isinstance(saved["args"], dict) or not isinstance(saved["global_step"], int):
        raise UserError(f"{path} is not a checkpoint of train_dual_head.py: malformed args or global_step")
    return saved


# ---- which one to go on from ----


def newest_good(paths, check, warn=warn) -> tuple[Path, dict] | None:
    """(path, its content) of the newest file in `paths` that verifies, or None; the others are warned about.
    check: called with (content, path), raises UserError for what can't be resumed. warn: takes a sentence."""
    for path in sorted(paths, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            state = load_checkpoint(path)
            check(state, path)
            return path, state
        except UserError as e:
            warn(f"warning: {e}; falling back to the one before")
    return None


def prune(paths, keep: int) -> None:
    """Delete all but the newest `keep` files; -1 keeps all."""
    old = sorted(paths, key=lambda p: p.stat().st_mtime)
    for path in old[: max(len(old) - keep, 0)] if keep >= 0 else []:
        path.unlink(missing_ok=True)


def find_resume(value: str, output_dir: str, pattern: str, check) -> tuple[str, dict | None]:
    """--resume as (path, content): a file itself; of a folder or auto (then output_dir) the newest that
    matches the glob `pattern` and verifies; ("", None) where auto finds none. check: as for newest_good."""
    if value != "auto" and not Path(value).is_dir():
        if not Path(value).is_file():
            raise UserError(f"--resume {value} does not exist")
        state = load_checkpoint(value)
        check(state, value)
        return value, state
    found = newest_good(Path(output_dir if value == "auto" else value).glob(pattern), check)
    if not found and value != "auto":
        raise UserError(f"--resume {value}: no usable {pattern} in that folder")
    return (str(found[0]), found[1]) if found else ("", None)


def refuse_overwriting(folder: str, asked: bool) -> None:
    """Raises UserError where `folder` holds a run; asked: that it should have been resumed."""
    held = sorted(Path(folder).glob("checkpoint_*.pt"), key=lambda p: p.stat().st_mtime)
    if held and os.environ.get("RANK", "0") == "0":
        what = "is damaged" if asked else "would be overwritten"
        raise UserError(
            f"{folder} holds a run whose {held[-1].name} {what}: go on with it by "
            "--resume auto, or name another --output_dir"
        )
