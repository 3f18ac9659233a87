"""Everything that may go wrong, on purpose: no traceback, nothing silent, no hang, no user's file changed.

    python tests/fuzz.py                         all cases of all areas, about 20 minutes on two cores
    python tests/fuzz.py --seed 7 --area values  other cases of one area (tests/helpers/chaos_AREA.py)
    python tests/fuzz.py --match 'infer onto'    those whose area, group or name matches

Prints a table of groups with counts, and every failure; exit code 1 on any. Area formats is
tests/test_fuzz.py: 210 spoiled wav files, shards and checkpoints, through the programs. CI takes a sample of
the cases (tests/test_chaos.py), without groups that begin with `slow: `.
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import conftest  # noqa: F401  threads and the hub are set before torch is imported
from helpers import fuzz as formats
from helpers import scene
from helpers.chaos import Case, judge

AREAS = [path.stem.removeprefix("chaos_") for path in sorted((TESTS / "helpers").glob("chaos_*.py"))]


def collect(seed: int, areas=AREAS) -> dict[str, list[Case]]:
    return {area: importlib.import_module(f"helpers.chaos_{area}").cases(seed) for area in areas}


def failures(cases: list[Case]):
    """Yield (case, what is wrong or None), each in an empty folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        scene.run()  # what many share is not one case's time
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
            yield case, judge(case, Path(folder))


def spoiled_formats(seed: int) -> tuple[Counter, list[str]]:
    """(cases of each group, failures) of tests/test_fuzz.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS / "test_fuzz.py")]
    env = os.environ | {"FUZZ_SEED": str(seed)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=TESTS.parent)
    counts = Counter(wav=formats.WAVS, shard=formats.SHARDS, checkpoint=formats.CHECKPOINTS)
    return counts, [done.stdout[-3000:]] if done.returncode else []


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0, help="other cases for another one")
    p.add_argument(
        "--area", default="", help=f"of {', '.join([*AREAS, 'formats'])}; several: A,B (default: all)"
    )
    p.add_argument("--match", default="", help="regular expression: the cases that match alone")
    args = p.parse_args()
    areas = args.area.split(",") if args.area else [*AREAS, "formats"]
    began, counts, wrong = time.time(), Counter(), []
    for area, cases in collect(args.seed, [a for a in areas if a != "formats"]).items():
        chosen = [c for c in cases if re.search(args.match, f"{area}: {c.group}: {c.name}")]
        for case, what in failures(chosen):
            counts[area, case.group] += 1
            if what:
                wrong.append((area, case.group, f"{area}: {case.group}: {case.name}: {what}"))
                print(wrong[-1][2], flush=True)
    if "formats" in areas and not args.match:
        found, bad = spoiled_formats(args.seed)
        counts.update({("formats", group): n for group, n in found.items()})
        wrong += [("formats", "wav", text) for text in bad]
        print(*bad, sep="\n")
    failed = Counter(row[:2] for row in wrong)
    print("\n| area | group | cases | failures |\n|---|---|---|---|")
    for (area, group), n in counts.items():
        print(f"| {area} | {group} | {n} | {failed[area, group]} |")
    print(f"| all | | {counts.total()} | {len(wrong)} |")
    print(f"\nseed {args.seed}, {time.time() - began:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
