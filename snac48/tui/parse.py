"""Lines of metrics.jsonl and of logs (ours and older ones) -> dicts with the keys of metrics.jsonl."""

import json
import re

STEP_LINE = re.compile(r"(?:^|\s)step (\d+)/(\d+) epoch (\d+)/(\d+) (\S+) ?(.*)")
BAR = re.compile(r"\d+%\|[^|]*\|\s*(\d+)/(\d+) \[(?:([\d:]+)<([\d:]+))?(.*)")
EPOCH = re.compile(r"[Ee]poch[ :]+(\d+)(?:/(\d+))?")
SUMMARY = re.compile(r"[Ee]poch (\d+)(?:/(\d+))? \[(Train|Val)\]:?(.*)")
PAIR = re.compile(r"([A-Za-z0-9_/]+)[=:]\s*([-+\w.]+)")
ERROR = re.compile(
    r"\w*(?:Error|Exception|KeyboardInterrupt)\b(?::|$)|: error: |out of memory|^Killed|Segmentation fault|"
    r"No space left|Bus error"
)
KEYS_SEEN_AS = {"24k": "loss_24k", "24khz": "loss_24k", "48k": "loss_48k", "48khz": "loss_48k",
                "eta": "eta_s", "segment": "segment_length", "audio_s/s": "audio_s_per_s",
                "audio-s/s": "audio_s_per_s", "bits/s": "bits_per_s"}  # fmt: skip
NOT_CURVES = {"t", "step", "total_steps", "epoch", "epochs", "segment_length", "eta_s", "best"}


def number(value) -> float | None:
    """float of a number or of "0.5", "NaN", "Infinity", "3:10:11" (seconds); None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"(\d+:)?\d+:\d\d", value):
        return float(sum(60**i * int(x) for i, x in enumerate(reversed(value.split(":")))))
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def counted(value) -> int | None:
    """A step or epoch: an int that fits the curves' 32-bit x axis, else None."""
    value = value if type(value) is int else number(value)
    return int(value) if value is not None and 0 <= value < 2**32 else None


def parse_line(line: str) -> dict | None:
    """The record of one line: JSON, our step line, a tqdm bar, `Epoch 4 [Train]: Loss=…` or `[Val]` (a record
    with event "val"); None for other text."""
    if line.startswith("{"):
        return parse_json(line)
    if m := STEP_LINE.search(line):
        step, total, epoch, epochs, phase, rest = m.groups()
        record = {"step": int(step), "total_steps": int(total), "epoch": int(epoch), "epochs": int(epochs)}
        record["phase"], words = phase, rest.split()
        pairs = zip(words[::2], words[1::2])
    elif m := SUMMARY.search(line):
        record = {"epoch": int(m[1]), "event": "val" if m[3] == "Val" else "epoch"}
        record |= {"epochs": int(m[2])} if m[2] else {}
        pairs = PAIR.findall(m[4])
    elif m := BAR.search(line):
        n, total, left, epoch = int(m[1]), int(m[2]), number(m[4]), EPOCH.search(line)
        record = {"step": n, "total_steps": total}
        if epoch:  # the bar counts batches of one epoch
            e, epochs = int(epoch[1]), int(epoch[2] or 0)
            record = {"step": max(0, e - 1) * total + n, "epoch": e}
            record |= {"epochs": epochs, "total_steps": epochs * total} if epochs else {}
            left = left + (epochs - e) * (left + number(m[3])) if epochs and left is not None else None
        record |= {} if left is None else {"eta_s": left}
        pairs = PAIR.findall(m[5])
    else:
        return None
    for key, value in pairs:
        if (value := number(value)) is not None:
            record.setdefault(KEYS_SEEN_AS.get(key.lower(), key.lower()), value)
    return record


def parse_json(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # half a line, or nested without end
        return None
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("ce"), list):  # train_rvq.py: cross-entropy of each codebook
        record |= {f"ce_{k}": v for k, v in enumerate(record.pop("ce")[:32])}
    if '"NaN"' in line or 'Infinity"' in line:
        for k, v in record.items():
            if isinstance(v, str) and v in ("NaN", "Infinity", "-Infinity"):
                record[k] = float(v)
    if "files" in record:  # precompute's name for it
        record.setdefault("total_steps", record["files"])
    return record
