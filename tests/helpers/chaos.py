"""Cases of what goes wrong: each says what it does in an empty folder and what a person must be told.

Areas are modules chaos_*.py beside this one, each with `cases(seed) -> list[Case]`. `python tests/fuzz.py`
runs all of them, tests/test_chaos.py a sample.
"""

import contextlib
import hashlib
import io
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snac48.audio import AudioError
from snac48.cli import UserError

SECONDS = 60  # longer is a hang


@dataclass(frozen=True)
class Case:
    """run(empty folder) does it, in this process or another; returns or prints what a person is told, or
    raises UserError. words: regular expression of what they must say. Where files of the user's are at hand,
    run does it inside `unchanged(folder of these)`."""

    group: str
    name: str
    run: Callable[[Path], str | None]
    words: str


class Hang(BaseException):
    pass


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@contextlib.contextmanager
def unchanged(folder: Path):
    """A user's files: none of them changed, gone or added to."""
    before = hashes(folder)
    yield
    after = hashes(folder)
    assert after == before, f"of the user's files: {sorted(set(before.items()) ^ set(after.items()))}"


def judge(case: Case, folder: Path) -> str | None:
    """None, or what is wrong: traceback, silent, hang, changed."""

    def ring(*_):
        raise Hang

    said, old = io.StringIO(), signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            told = case.run(folder) or ""
    except (UserError, AudioError, SystemExit) as e:
        told = str(e)
    except Hang:
        return f"hang: {time.monotonic() - started:.0f} s"
    except AssertionError as e:
        return f"changed: {e}"
    except Exception as e:
        return f"traceback: {type(e).__name__}: {e}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    words = said.getvalue() + told
    if "Traceback (most recent call last)" in words:
        return f"traceback: {words[-300:]}"
    if not re.search(case.words, words):
        return f"silent: wanted {case.words!r}, told {words[-300:]!r}"
    return None
