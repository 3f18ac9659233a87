"""Lines of metrics.jsonl and of logs (ours and older ones) -> dicts with the keys of metrics.jsonl."""

import json
import re

STEP_LINE = re.compile(r"(?:^|\s)step (\d+)/(\d+) epoch (\d+)/(\d+) (\S+) ?(.*)")
BAR = re.compile(r"^(.*?)\d+%\|[^|]*\|\s*(\d+)/(\d+) \[(?:([\d:]+)<([\d:]+))?(.*)")
EPOCH = re.compile(r"\bepoch[ :#]*(\d+)(?:/(\d+))?", re.I)
SUMMARY = re.compile(r"[Ee]poch (\d+)(?:/(\d+))? \[(Train|Val)\]:?(.*)")
HEAD = re.compile(r"(?:^|\s)(24|48) ?kHz: (Loss=.*)")  # the lines below `Epoch 3 [Val]:`
PHASE = re.compile(r"\bPHASE \d+: ([A-Z]+(?: [A-Z]+)*)")  # banners
VAL_STEP = re.compile(r"validation after epoch (\d+) \(step (\d+)\): (.*)")
PAIR = re.compile(r"([A-Za-z0-9_/]+)[=:]\s*([-+\w.]+)")
WORDS = re.compile(r"([a-z]\w*) ([-+]?(?:\d[\w.+-]*|nan|inf))\b")
# older language models: `epoch 3/350 | train 4.21 | val 4.19 | ppl 66.0`, `epoch 3: train_loss=4.21`
TOKENS = re.compile(
    r"(?<![\w-])(?<!best )(val(?:_loss| loss)?|train(?:ing|_loss| loss)?|(?:val_)?ppl|lr)[=: ]+"
    r"(\d+\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+|nan|inf)\b",
    re.I,
)
CODEBOOKS = re.compile(r"\bce\b[^=:\[\d]*[=:\[ ]\s*((?:\d+\.\d+[,\s]*){2,})", re.I)  # a number for each
ERROR = re.compile(
    r"\w*(?:Error|Exception|KeyboardInterrupt)\b(?::|$)|: error: |out of memory|^Killed|Segmentation fault|"
    r"No space left|Bus error"
)
KEYS_SEEN_AS = {"24k": "loss_24k", "24khz": "loss_24k", "48k": "loss_48k", "48khz": "loss_48k",
                "eta": "eta_s", "segment": "segment_length", "audio_s/s": "audio_s_per_s",
                "audio-s/s": "audio_s_per_s", "bits/s": "bits_per_s"}  # fmt: skip
NOT_CURVES = {
    "t",
    "step",
    "total_steps",
    "epoch",
    "epochs",
    "segment_length",
    "eta_s",
    "best",
    "epoch_s",
    "elapsed_s",
}


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
    """The record of one line; None for other text.

    JSON, our step line, a tqdm bar, `Epoch 4 [Train]: Loss=…` (event "epoch") or `[Val]` (event "val") and
    the lines of each head below it (event "more": of the summary before), a language model's epoch, a banner.
    """
    if line.startswith("{"):
        return parse_json(line)
    if m := STEP_LINE.search(line):
        step, total, epoch, epochs, phase, rest = m.groups()
        record = {"step": int(step), "total_steps": int(total), "epoch": int(epoch), "epochs": int(epochs)}
        return filled(record | {"phase": phase}, zip(rest.split()[::2], rest.split()[1::2]))
    if m := BAR.search(line):
        return parse_bar(m)
    if m := SUMMARY.search(line):
        record = {"epoch": int(m[1]), "event": "val" if m[3] == "Val" else "epoch"}
        return filled(record | ({"epochs": int(m[2])} if m[2] else {}), PAIR.findall(m[4]))
    if m := HEAD.search(line):
        parts = {key.lower(): value for key, value in PAIR.findall(m[2])}
        return filled({"event": "more"}, ((f"{key}_{m[1]}k", value) for key, value in parts.items()))
    if m := VAL_STEP.search(line):
        return filled({"event": "val", "epoch": int(m[1]), "step": int(m[2])}, WORDS.findall(m[3]))
    if m := PHASE.search(line):
        return {"phase": m[1].lower()}
    return parse_tokens(line)


def filled(record: dict, pairs) -> dict:
    """`record` and the numbers among the pairs, by the keys of metrics.jsonl; the first of a key counts."""
    for key, value in pairs:
        if (value := number(value)) is not None:
            record.setdefault(KEYS_SEEN_AS.get(key.lower(), key.lower()), value)
    return record


def parse_bar(m: re.Match) -> dict | None:
    """tqdm's bar of an epoch (it counts that epoch's batches) or of a whole job; not of a validation."""
    n, total, left, epoch = int(m[2]), int(m[3]), number(m[5]), EPOCH.search(m[1])
    if re.search(r"\b(?:val|eval|test)", m[1], re.I):
        return None
    record = {"step": n, "total_steps": total}
    if epoch:
        e, epochs = int(epoch[1]), int(epoch[2] or 0)
        record = {"step": max(0, e - 1) * total + n, "epoch": e}
        record |= {"epochs": epochs, "total_steps": epochs * total} if epochs else {}
        left = left + (epochs - e) * (left + (number(m[4]) or 0)) if epochs and left is not None else None
    else:
        record["event"] = "bar"  # counts only where nothing tells of epochs
    return filled(record | ({} if left is None else {"eta_s": left}), PAIR.findall(m[6]))


def parse_tokens(line: str) -> dict | None:
    """An epoch of an older language model, or its codebooks' cross-entropies on a line of their own."""
    epoch, books = EPOCH.search(line), CODEBOOKS.search(line)
    names = {"val_ppl": "ppl", "val_loss": "val", "val loss": "val"}
    values = {names.get(k.lower(), k.lower()[:5]): number(v) for k, v in TOKENS.findall(line)}
    ce = {f"ce_{k}": number(v) for k, v in enumerate(re.findall(r"[\d.]+", books[1])[:32])} if books else {}
    if not epoch:
        return {"event": "more", **ce} if ce else None
    if not {"val", "train"} & values.keys():
        return None
    record = {"epoch": int(epoch[1]), **{k: values[k] for k in ("ppl", "lr") if k in values}, **ce}
    record |= {"epochs": int(epoch[2])} if epoch[2] else {}
    if "val" in values:
        return {"event": "val", "loss": values["val"], "train_loss": values.get("train"), **record}
    return {"event": "epoch", "loss": values["train"], **record}


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
