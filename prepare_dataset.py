"""Split an audio folder into train/audio and valid/audio: links by default, the same split for the same seed.

    python prepare_dataset.py --input_dir recordings                    # -> corpus, 95 % of it for training
    python prepare_dataset.py --input_dir recordings --group_by top     # a speaker a folder
    python prepare_dataset.py --input_dir recordings --group_by 'regex:^([a-z]+\\d+)_'

--group_by keeps a speaker in one part: top takes all files below one folder of --input_dir (es/alpha and
es/syllab, too), parent the files of one folder, regex:PATTERN what PATTERN's first parenthesis finds in the
path below --input_dir. Relative paths are kept, so files of one name in two folders stay apart. Writes
manifest.json: what was really done, with the counts and the groups.
"""

import argparse
import os
import random
import re
import shutil
from pathlib import Path

from snac48.audio import SPLIT_FORMAT, find_audio
from snac48.cli import UserError, main_guard, read_flags, warn
from snac48.files import write_json
from snac48.places import check_place
from snac48.runlog import show


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--input_dir", required=True, help="audio folder, read recursively")
    add("--output_dir", default="corpus", help="gets train/audio, valid/audio and manifest.json")
    add("--train_ratio", type=float, default=0.95, help="share of the files for training")
    add("--seed", type=int, default=42, help="another one gives another split")
    add("--copy", action="store_true", help="copy the files instead of linking them")
    add("--group_by", default="", help="top, parent, or regex:PATTERN with a parenthesis; default: each file")
    add("--valid_list", default="", help="file of validation paths, one a line, instead of a ratio")
    args = read_flags(p, argv)
    if args.group_by not in ("", "top", "parent"):
        pattern = args.group_by.removeprefix("regex:")
        try:
            if not re.compile(pattern).groups:
                raise re.error("no parenthesis")
        except re.error as e:
            what = f"--group_by {pattern!r} is not a regular expression with one parenthesis"
            raise UserError(f"{what}: {e}") from None
    return args


def group_of(rel: str, group_by: str) -> str:
    """The group a file belongs to, or the file itself without --group_by. Raises UserError."""
    if not group_by:
        return rel
    if group_by in ("top", "parent"):
        return (rel.partition("/")[0] if group_by == "top" else rel.rpartition("/")[0]) if "/" in rel else "."
    pattern = group_by.removeprefix("regex:")
    found = re.search(pattern, rel)
    if found is None:
        raise UserError(f"--group_by {pattern!r} does not match {rel}: every file needs a group")
    return found.group(1)


def split(files: list[str], train_ratio: float, seed: int, group_by: str) -> tuple[set, dict]:
    """(validation files, {group: files}): whole groups go to validation until it has its share of files. Both
    parts get at least one group. Raises UserError when there are fewer than two groups."""
    groups: dict[str, list[str]] = {}
    for rel in files:
        groups.setdefault(group_of(rel, group_by), []).append(rel)
    if len(groups) < 2:
        raise UserError(f"{len(files)} files form {len(groups)} group: two parts need at least two")
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    wanted = round((1 - train_ratio) * len(files))
    valid: list[str] = []
    for i, name in enumerate(order):
        more = len(valid) + len(groups[name])
        closer = more <= wanted or more - wanted < wanted - len(valid)  # to its share
        last_chance = not valid and i == len(order) - 1
        if (closer or last_chance) and more < len(files):
            valid += groups[name]
    return set(valid or min((groups[n] for n in order), key=len)), groups


def repeated(train: list[str], valid: list[str]) -> list[str]:
    """Folder names in groups of both parts, such as `es` and `a` of es/a, es/b | fr/a, but not one in all."""
    names = [[set(group.split("/")) for group in part] for part in (train, valid)]
    everywhere = set.intersection(*names[0], *names[1])
    return sorted(set.union(*names[0]) & set.union(*names[1]) - everywhere)


def read_list(files: list[str], path: str) -> set[str]:
    """The validation files that a list names. Raises UserError for one that doesn't exist."""
    try:
        valid = {line for line in Path(path).read_text(encoding="utf-8").splitlines() if line}
    except OSError as e:
        raise UserError(f"--valid_list {path} cannot be read: {e.strerror}") from None
    except UnicodeError:
        raise UserError(f"--valid_list {path} is not UTF-8 text: save it as UTF-8") from None
    unknown = sorted(valid - set(files))
    if unknown or not 0 < len(valid) < len(files):
        such = f", such as {unknown[0]}" if unknown else ""
        counts = f"{len(valid)} files, {len(unknown)} of them not in --input_dir"
        raise UserError(f"--valid_list {path} names {counts}{such}")
    return valid


def main(args) -> int:
    source, out = Path(args.input_dir).resolve(), Path(args.output_dir)
    files = find_audio(args.input_dir)
    check_place(out, "--output_dir")
    if held := [name for name in ("train", "valid", "manifest.json") if os.path.lexists(out / name)]:
        raise UserError(f"{out} holds {held[0]} of another split: choose another --output_dir")
    if args.valid_list:
        valid, groups = read_list(files, args.valid_list), {rel: [rel] for rel in files}
    else:
        valid, groups = split(files, args.train_ratio, args.seed, args.group_by)
    part = {rel: "valid" if rel in valid else "train" for rel in files}
    transfer = shutil.copy2 if args.copy else os.symlink
    for rel in files:
        place = out / part[rel] / "audio" / rel
        place.parent.mkdir(parents=True, exist_ok=True)
        transfer(source / rel, place)
    counts = {"train": len(files) - len(valid), "valid": len(valid)}
    found = {p: sorted({g for g, members in groups.items() if part[members[0]] == p}) for p in counts}
    manifest = {
        "format": SPLIT_FORMAT,  # by which, and by the place, the links in it are known as ours
        "output_dir": str(out.resolve()),
        "input_dir": str(source),
        "mode": "copy" if args.copy else "symlink",
        "seed": args.seed,
        "train_ratio_asked": args.train_ratio,
        "train_ratio": round(counts["train"] / len(files), 4),
        "group_by": args.group_by or None,
        "valid_list": args.valid_list or None,
        "files": counts,
        "groups": {p: len(g) for p, g in found.items()},
        "valid_groups": found["valid"] if args.group_by else None,
    }
    write_json(out / "manifest.json", manifest)
    both = repeated(found["train"], found["valid"]) if args.group_by else []
    if both:
        many = f", … ({len(both)} in all)" if len(both) > 3 else ""
        hint = "if they are one speaker each, use --group_by top or a regex"
        warn(f"warning: {', '.join(both[:3])}{many} in both parts: {hint}")
    folders = {p: {rel.partition("/")[0] for rel in files if "/" in rel and part[rel] == p} for p in counts}
    shared = folders["train"] & folders["valid"]
    if shared and not (args.group_by or args.valid_list):
        many = f"{len(shared)} folders, such as {min(shared)}, are"
        warn(f"warning: {many} in both parts: if they are one speaker each, use --group_by top")
    in_groups = f" in {len(found['train'])} and {len(found['valid'])} groups" if args.group_by else ""
    done = f"{counts['train']} training and {counts['valid']} validation files{in_groups}"
    share = f"{100 * counts['train'] / len(files):.1f} % for training"
    asked = "by --valid_list" if args.valid_list else f"--train_ratio {args.train_ratio:g}"
    show(f"{done} ({share}; asked: {asked}) -> {out}/train/audio, {out}/valid/audio\n")
    return 0


if __name__ == "__main__":
    main_guard(lambda: main(parse_args()))
