"""Where things lie when no flag says so: conventional folders below a data root, ours and older ones."""

import errno
import os
import tempfile
from pathlib import Path

from .cli import NO_ROOM, UserError

# Names of the two splits; what we make ourselves is called as LAYOUTS says, the others are found, too.
ALIASES = {"train": ("train",), "val": ("val", "valid", "validation", "dev")}
LAYOUTS = {  # kind: folders below the data root, the first as our programs make it
    "recordings": ("corpus/{}/audio", "combine/{}/audio"),
    "targets": ("targets/{}", "combine_48khz/{}/audio"),
    "codes": ("codes/{}", "codes_phase11/{}"),
}
MADE_BY = {
    "recordings": "python prepare_dataset.py --input_dir RECORDINGS",
    "targets": "./launch.sh precompute GPUS",
    "codes": "./launch.sh cache GPUS",
}


def data_root(flag: str = "") -> Path:
    """--data_root, else $DATA_ROOT, else the current folder."""
    return Path(flag or os.environ.get("DATA_ROOT", ""))


def found(root: Path, kind: str, split: str) -> Path | None:
    """The folder of recordings, targets or codes of a split (train or val) that is there, or None."""
    for layout in LAYOUTS[kind]:
        for name in ALIASES[split]:
            if (root / layout.format(name)).is_dir():
                return root / layout.format(name)
    return None


def made(root: Path, kind: str, split: str) -> Path:
    """Where our programs put it: what is there, else the conventional place."""
    name = "valid" if kind == "recordings" and split == "val" else split  # as prepare_dataset.py always did
    return found(root, kind, split) or root / LAYOUTS[kind][0].format(name)


def split_of(folder: Path, split: str) -> Path:
    """The subfolder of a split, under whichever of its names it is there."""
    names = [folder / name for name in ALIASES[split]]
    return next((path for path in names if path.is_dir()), names[0])


def both_splits(root: Path, kind: str, output: str) -> list[tuple[Path, Path]]:
    """[(folder of `kind`, place of `output`)] of the splits that are there. UserError without train."""
    there = [(found(root, kind, split), split) for split in ALIASES]
    if there[0][0] is None:
        raise UserError(missing(root, [(kind, "train", "")]))
    return [(folder, made(root, output, split)) for folder, split in there if folder]


def imports(old: Path, source: str, target: str, root: Path) -> list[tuple[Path, Path, Path]]:
    """[(recordings, place of a cache, older cache)] of an older cache, or of both splits below its folder.
    source, target: what flags say; else the split that the older cache's name tells. UserError."""
    both = [place for split in ALIASES if (place := split_of(old, split)).is_dir()]
    if both and (source or target):
        raise UserError(f"{old} holds {both[0].name}: import one split, or both without naming folders")
    found_all = []
    for cache in both or [old]:
        split = next((split for split, names in ALIASES.items() if cache.name in names), None)
        recordings = source or (split and found(root, "recordings", split))
        place = target or (split and root / LAYOUTS["codes"][0].format(split))
        if not recordings or not place:
            lacks = (
                "--data_dir and --output_dir" if not split else f"--data_dir (looked below {root.resolve()})"
            )
            raise UserError(f"to import {cache}, give {lacks}")
        found_all.append((Path(recordings), Path(place), cache))
    return found_all


def asked(source, target, flags: str, root: str, output: str) -> list[tuple[Path, Path]]:
    """[(recordings, output)] as two flags say, or of both splits where neither is given. UserError."""
    if source and target:
        if Path(source).resolve() == Path(target).resolve():
            raise UserError(f"{flags} are the same folder, {source}: choose another place to write to")
        return [(Path(source), Path(target))]
    if source or target:
        rest = "give both, or neither: then both splits below --data_root are done"
        raise UserError(f"{flags} go together: {rest}")
    return both_splits(data_root(root), "recordings", output)


def missing(root: Path, wanted: list[tuple[str, str, str]]) -> str:
    """One sentence on missing folders, (kind, split, name that a flag gave), and how to make them."""
    names = ", ".join(name or str(made(root, kind, split)) for kind, split, name in wanted)
    verb = "is" if len(wanted) == 1 else "are"
    kinds = dict.fromkeys(kind for kind, _, _ in wanted)
    if found(root, "recordings", "train") is None:
        kinds = {"recordings": None, **kinds}
    return (
        f"{names} {verb} missing (looked below {root.resolve()}; --data_root or DATA_ROOT names another "
        f"place); make it by: {'; '.join(MADE_BY[kind] for kind in kinds)}"
    )


# The option --allow_links of the scripts that read recordings; audio.allow_links takes its value.
ALLOW_LINKS = {
    "default": "",
    "metavar": "DIR[:DIR]",
    "help": "folders outside of the data that links in it may lead to",
}

# ---- where things are written ----


def check_place(folder: str | Path, flag: str, inputs=()) -> None:
    """Raises UserError where `folder` can't be made or written into, is one of the folders `inputs`, or lies
    inside one; leaves nothing behind. Whether it can be written shows a trial: permissions, read-only disks
    and odd file systems all have their own rules."""
    if not str(folder):
        raise UserError(f"{flag} must name a place, not an empty one")
    try:
        place = Path(folder)
        if long := [name for name in place.parts if len(os.fsencode(name)) > 255]:
            raise OSError(errno.ENAMETOOLONG, f"a name of {len(os.fsencode(long[0]))} bytes, 255 are allowed")
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{flag} {folder} can't be made: {place} is no folder")
        os.rmdir(tempfile.mkdtemp(dir=place))
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        if getattr(e, "errno", 0) in NO_ROOM:
            return  # whoever writes says what to do, and may find room by then
        why, name = getattr(e, "strerror", None) or e, str(folder)
        name = name if len(name) < 200 else f"{name[:60]}…"
        raise UserError(f"{flag} {name} can't be written ({why}): choose another place") from None
    for source in inputs:
        if Path(folder).resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"{flag} {folder} is, or lies inside, {source}, which is read: choose another")


def check_free(paths, inputs, overwrite: bool, flag: str) -> None:
    """Raises UserError where a file of `paths` can't be made, is there already, or is one of the files
    `inputs`, which --overwrite doesn't give up either."""
    for path in map(Path, paths):
        check_place(path.parent, flag)
        if len(os.fsencode(path.name)) > 255:
            check_place(path, flag)  # it says so
        if path.is_dir():
            raise UserError(f"{flag}: {path} is a folder: name a file")
        if path.exists() and any(os.path.exists(x) and os.path.samefile(path, x) for x in inputs):
            raise UserError(f"{flag}: {path} is what is read: choose another name")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"{flag}: {path} exists: --overwrite replaces it, or choose another name")


# ---- the folders of a training ----

RAW_RECIPES = ("phase10", "phase11-standard", "phase11-warmup")  # read recordings, not codes, by default
STRENGTH = ("default", "recipe", "checkpoint", "config", "flag")


def reads_recordings(values: dict) -> bool:
    """Whether these options mean recordings, named or not, rather than codes."""
    if values["data_dir"] or values["cache_dir"] or values["codes_dir"]:
        return bool(values["data_dir"])
    return values["recipe"] in RAW_RECIPES or bool(values["from_scratch"])


def settle(values: dict, origin: dict) -> None:
    """Fill in the folders that neither flag nor config names, in place: of recordings, or of codes, and of
    48 kHz targets.

    Of two that exclude each other (--data_dir and --cache_dir, --codes_dir and --cache_dir) that from the
    stronger source wins. What isn't found stays "".
    """
    strong = lambda name: STRENGTH.index(origin[name]) if values[name] else -1
    cached = max(strong("codes_dir"), strong("cache_dir"))
    if cached > strong("data_dir") >= 0:  # a cache given as a flag: the config's recordings are its originals
        for prefix in ("", "val_"):
            values[f"{prefix}audio_24k_dir"] = values[f"{prefix}audio_24k_dir"] or values[f"{prefix}data_dir"]
            values[f"{prefix}data_dir"] = ""
    elif strong("data_dir") > cached >= 0:
        values |= {"codes_dir": "", "cache_dir": "", "val_cache_dir": ""}
    if values["codes_dir"] and strong("codes_dir") > strong("cache_dir"):
        values |= {"cache_dir": "", "val_cache_dir": ""}
    root = data_root(values["data_root"])
    kinds = [("recordings", "data_dir")] if reads_recordings(values) else [("codes", "cache_dir")]
    if values["heads"] != "24k" and not values["data_dir"]:
        kinds.append(("targets", "audio_48k_dir"))
    for kind, name in kinds:
        for split, key in (("train", name), ("val", f"val_{name}")):
            if kind == "codes" and values["codes_dir"]:
                values[key] = values[key] or str(split_of(Path(values["codes_dir"]), split))
            place = found(root, kind, split)
            if not values[key] and place:
                values[key], origin[key] = str(place), "found"


def check_training(args, there: bool = False) -> None:
    """Raises UserError on all that a training still lacks, at once; there: named folders must exist."""
    if args.data_dir and args.cache_dir:
        raise UserError("--data_dir encodes recordings, --cache_dir has their codes: give one of them")
    if args.recipe == "phase12-gan" and not (args.start_checkpoint or args.resume):
        raise UserError("phase12-gan goes on from a finished run: --start_checkpoint RUN/best_model.pt")
    raw = reads_recordings(vars(args))
    needs = {"data_dir": "recordings"} if raw else {"cache_dir": "codes"}
    if args.heads != "24k" and (not raw or args.audio_48k_dir):
        needs["audio_48k_dir"] = "targets"
    lacking = []
    for name, kind in needs.items():
        for split, prefix in (("train", ""), ("val", "val_")):
            value = getattr(args, prefix + name)
            if not value or (there and not all(Path(folder).is_dir() for folder in value.split(","))):
                lacking.append((kind, split, value))
    if lacking:
        raise UserError(missing(data_root(args.data_root), lacking))


def check_run_place(args) -> None:
    """Raises UserError for an --output_dir that can't be written, or that lies in the data."""
    read = [f"{prefix}{name}" for name in ("data_dir", "cache_dir", "audio_48k_dir", "audio_24k_dir")
            for prefix in ("", "val_")]  # fmt: skip
    folders = [folder for name in read for folder in getattr(args, name).split(",") if folder]
    check_place(args.output_dir, "--output_dir", folders)
