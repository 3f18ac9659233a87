"""Checkpoints: written whole, verified before they are believed."""

import itertools
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

ABANDONED = "abandoned"  # folder in a run directory: see set_aside


def position(path: Path) -> tuple[int, int] | None:
    """Where in its run a checkpoint lies, by what it holds: (step, last validated epoch). Never by the file's
    time: clocks are set back, and a copied folder has one time for all. None for a file that can't be opened
    (the tensors are not read)."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(state["global_step"]), int(state.get("validated_epoch", 0))
    except Exception:  # it is damaged, or of something else: load_checkpoint says how
        return None


def in_order(paths) -> tuple[list[Path], list[Path]]:
    """(those that can't be opened, the others by their step)."""
    found = {path: position(path) for path in sorted(paths)}
    opened = [path for path in found if found[path]]
    return [path for path in found if not found[path]], sorted(opened, key=lambda p: found[p])


def newest_good(paths, check, warn=warn) -> tuple[Path, dict] | None:
    """(path, its content) of the file in `paths` of the highest step that verifies, or None; the others that
    it met are warned about. check: called with (content, path), raises UserError for what can't be resumed.
    warn: takes a sentence."""
    damaged, ordered = in_order(paths)
    for path in [*damaged, *reversed(ordered)]:
        try:
            state = load_checkpoint(path)
            check(state, path)
            return path, state
        except UserError as e:
            warn(f"warning: {e}; falling back to another one")
    return None


def prune(paths, keep: int) -> None:
    """Delete all but the `keep` files of the highest steps; -1 keeps all."""
    paths = list(paths)
    if 0 <= keep < len(paths):
        damaged, ordered = in_order(paths)
        for path in [*damaged, *ordered][: len(paths) - keep]:
            path.unlink(missing_ok=True)


def set_aside(folder: Path, pattern: str, here: tuple[int, int], say) -> None:
    """Move checkpoints from beyond position `here`, at which the run goes on or begins, into
    folder/abandoned: a choice by hand or a divergence has left them behind, and with them the newest would
    not be the run's. With them go those that can't be opened. say: takes a sentence."""
    found = {path.name: position(path) for path in sorted(folder.glob(pattern))}
    names = [name for name, where in found.items() if where is None or where > here]
    for name in names:
        (folder / ABANDONED).mkdir(exist_ok=True)
        free = (f"{name}.{n}" if n else name for n in itertools.count())
        place = next(path for path in map((folder / ABANDONED).joinpath, free) if not path.exists())
        os.replace(folder / name, place)
    if names:
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        say(f"from step {here[0]}; {some}, damaged or of later steps: now in {folder / ABANDONED}")


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


def refuse_overwriting(args, asked: bool) -> None:
    """Raises UserError where --output_dir holds a run that this one, which is not resumed from there, would
    overwrite; asked: that it should have been resumed."""
    folder = Path(args.output_dir)
    held = sorted(folder.glob("checkpoint_*.pt"))
    place = Path(args.resume).resolve().parent if args.resume else None
    own = place in (folder.resolve(), folder.resolve() / ABANDONED)
    if own or int(os.environ.get("RANK", 0)):
        return
    if held and not args.resume:
        what = "can't be used, nor any other" if asked else "would be overwritten"
        raise UserError(
            f"{folder} holds a run whose {held[-1].name} {what}: name another --output_dir"
            + ("" if asked else ", or go on with that run by --resume auto and its own options")
        )
    if held:
        raise UserError(
            f"{folder} holds a run of its own ({held[-1].name}), and --resume {args.resume} lies elsewhere: "
            "name another --output_dir, or go on with the run that is there by --resume auto"
        )
    refuse_best(sorted(folder.glob("best_model*.pt")), vars(args), "--output_dir")


def refuse_best(paths, options: dict, flag: str) -> None:
    """Raises UserError where one of the files, the best of a run of which nothing else is left, is not what
    the same options would make again: a start, or a run of them that was killed before its checkpoint."""
    for path in paths:
        where = position(path)
        if where and (where[0] == 0 or made_by(path, options)):
            continue
        of = f"of step {where[0]} of an earlier run" if where else "of an earlier run, it seems,"
        raise UserError(
            f"{path.parent} holds {path.name} {of} with other options, which would be overwritten: name "
            f"another {flag}, or move it away"
        )


def made_by(path: Path, options: dict) -> bool:
    """Whether the run that wrote this checkpoint had these options. What is decided at the start (None, "")
    or says where, not what, may differ."""
    saved = load_checkpoint(path).get("args", {})
    free = ("resume", "device", "num_workers", "config", "data_root")
    given = {k: v for k, v in options.items() if k not in free and v not in (None, "")}
    return all(saved.get(k, v) == v for k, v in given.items())
