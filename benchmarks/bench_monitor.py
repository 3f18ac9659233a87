"""Figures of monitor.py, as a person over SSH meets them: the real program in a pseudo-terminal of 80x24.

    python benchmarks/bench_monitor.py            all of it: 1 GB of disk in $TMPDIR, about 2 minutes
    python benchmarks/bench_monitor.py --gb 0.1   a quick look
    python benchmarks/bench_monitor.py --pictures DIR [--log_dir LOGS]   every view, as SVG and text

Prints a Markdown table. CPU time is user + system of the monitor's process from /proc, bytes are what it
writes to the terminal, memory is resident memory (VmRSS, peak VmHWM).
"""

import argparse
import asyncio
import fcntl
import html
import os
import pty
import re
import resource
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from helpers import fake_runs as fake

from snac48.tui.app import Monitor
from snac48.tui.plot import DOTS
from snac48.tui.runs import Fleet
from snac48.tui.ui import VIEWS, Ui
from snac48.tui.views import draw

HZ = os.sysconf("SC_CLK_TCK")


class Terminal:
    """monitor.py in a pty; a thread counts and keeps what it writes."""

    def __init__(self, *args, cwd):
        pid, self.fd = pty.fork()
        if pid == 0:
            os.chdir(cwd)
            os.environ.update(TERM="xterm-256color", PYTHONDONTWRITEBYTECODE="")
            os.execv(sys.executable, [sys.executable, str(ROOT / "monitor.py"), "--quiet", *args])
        self.pid, self.start, self.bytes, self.text = pid, time.perf_counter(), 0, b""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.alive = True
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        while self.alive:
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:
                    return
                self.bytes += len(data)
                self.text = (self.text + data)[-200_000:]

    def until(self, text: str, timeout: float = 30) -> float:
        """Seconds from the start until `text` has been written."""
        while text.encode() not in self.text:
            if time.perf_counter() - self.start > timeout:
                raise SystemExit(f"{text!r} never appeared; last: {self.text[-300:]!r}")
            time.sleep(0.002)
        return time.perf_counter() - self.start

    def press(self, keys: str):
        os.write(self.fd, keys.encode())

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / HZ

    def memory_mb(self, key="VmRSS") -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split(f"{key}:")[1].split()[0]) * 1024 / 1e6

    def close(self):
        self.press("q")
        os.waitpid(self.pid, 0)
        self.alive = False
        self.thread.join()
        os.close(self.fd)


def big_log(folder: Path, gb: float) -> None:
    """A log without a metrics file, of `gb` GB: the monitor has only the text."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    lines = fake.human([fake.train_record(i) for i in range(1, 2991)]).splitlines()
    rest = [line.split("/3000", 1)[1] for line in lines]
    with open(logs / "train_gpu0.log", "w") as f:
        step = 0
        while f.tell() < gb * 1e9:
            f.write("".join(f"step {n}/99999999{text}\n" for n, text in enumerate(rest, step + 1)))
            step += len(rest)
        f.write("step 99999998/99999999 epoch 15/15 main loss 0.1234 24k 0.4 48k 0.5 lr 1.00e-05\n")


def drawn_dots(svg: str) -> str:
    """Braille as small squares, and no font from the net: the picture looks the same everywhere."""

    def squares(found):
        css, x, y, rest, text, path = found[1], float(found[2]), float(found[3]), found[4], found[5], ""
        dots = [(r, c, bit) for r, row in enumerate(DOTS) for c, bit in enumerate(row)]
        for i, char in enumerate(html.unescape(text)):
            for r, c, bit in dots if "\u2800" < char <= "\u28ff" else ():
                if ord(char) & bit:
                    path += f"M{x + 12.2 * i + 1.6 + 6.1 * c:.1f} {y - 17.5 + 6.15 * r:.1f}h3v3h-3z"
        kept = re.sub("[\u2800-\u28ff]", "&#160;", text)
        drawn = f'<path class="{css}" d="{path}"/>'
        return drawn + f'<text class="{css}" x="{found[2]}" y="{found[3]}"{rest}>{kept}</text>'

    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S).replace("Fira Code", "DejaVu Sans Mono")
    braille = r'<text class="([^"]+)" x="([\d.]+)" y="([\d.]+)"([^>]*)>([^<]*[\u2801-\u28ff][^<]*)</text>'
    return re.sub(braille, squares, svg)


def export(fleet: Fleet, folder: Path, sizes=((80, 24), (120, 40))) -> list[Path]:
    """A picture (SVG) and a text of every view at each size, drawn by the app itself without a terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    async def pictures(width, height):
        app = Monitor(fleet, Ui(), Path("launch.sh"))
        async with app.run_test(size=(width, height)) as pilot:
            for view in VIEWS:
                app.action_do(view)
                await pilot.pause()
                svg = drawn_dots(app.export_screenshot(title="monitor.py"))
                text = "".join("".join(t for t, _ in line).rstrip() + "\n" for line in app.pane.lines)
                for suffix, content in (("svg", svg), ("txt", text)):
                    written.append(folder / f"{view}_{width}x{height}.{suffix}")
                    written[-1].write_text(content, encoding="utf-8")

    for size in sizes:
        asyncio.run(pictures(*size))
    return written


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gb", type=float, default=1.0, help="size of the big log")
    p.add_argument(
        "--seconds",
        type=float,
        default=30,
        help="length of the live measurement, or of the look before the pictures",
    )
    p.add_argument("--pictures", type=Path, metavar="DIR", help="write pictures of every view and leave")
    p.add_argument("--log_dir", type=Path, default=ROOT / "logs", help="of the runs in the pictures")
    a = p.parse_args()
    if a.pictures:
        fleet, end = Fleet(a.log_dir), time.monotonic() + a.seconds
        fleet.look_closer = True
        fleet.poll()
        while time.monotonic() < end:  # the System view draws what it has seen
            time.sleep(1)
            fleet.poll()
        while fleet.load_older(60):
            pass
        print(*export(fleet, a.pictures), sep="\n")
        return
    rows, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        big_log(tmp / "big", a.gb)
        times, cpus, rss, cold = [], [], [], []
        for _ in range(5):
            t = Terminal(cwd=tmp / "big")
            times.append(t.until("train_gpu0"))
            cpus.append(t.cpu())
            t.until("0.1234")
            rss.append(t.memory_mb())
            t.press("4")
            begin = time.perf_counter()
            t.until("99999998/99999999 epoch")
            cold.append(time.perf_counter() - begin)
            t.close()
        first = f"{statistics.median(times):.2f} s (CPU {statistics.median(cpus):.2f} s)"
        rows.append((f"{a.gb:g} GB log: start to first paint (median of 5)", first, "0.5 s"))
        rows.append(
            (f"{a.gb:g} GB log: key 4 to its last lines on screen", f"{statistics.median(cold):.3f} s", "")
        )
        rows.append((f"{a.gb:g} GB log: memory after first paint", f"{max(rss):.0f} MB", "70 MB"))
        t = Terminal(cwd=tmp / "big")
        t.until("0.1234")
        begin = time.perf_counter()
        last = t.cpu()
        while time.perf_counter() - begin < 120:
            time.sleep(2)
            if t.cpu() - last < 0.2:
                break
            last = t.cpu()
        rows.append(
            (
                "… its latest 64 MB read as history, in the background",
                f"{time.perf_counter() - begin:.0f} s",
                "",
            )
        )
        rows.append(("… peak memory of that", f"{t.memory_mb('VmHWM'):.0f} MB", "70 MB"))
        t.close()

        live = tmp / "live"
        proc = [fake.real_process(live, f"train_gpu{i}") for i in range(8)]
        files = []
        for i in range(8):
            run_dir = fake.add_run(
                live, f"train_gpu{i}", "train", [i], records=fake.train_records(1000, seed=i)
            )
            files.append(
                (open(run_dir / "metrics.jsonl", "a"), open(live / "logs" / f"train_gpu{i}.log", "a"))
            )
        stop = threading.Event()

        def write():
            step = 1001
            while not stop.wait(1):
                for i, (metrics, log) in enumerate(files):
                    r = fake.train_record(step, seed=i, t=time.time())
                    metrics.write(fake.dump([r]))
                    log.write(fake.human([r]))
                    metrics.flush()
                    log.flush()
                step += 1

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            for name, key in (("overview", "1"), ("run", "2"), ("log", "4"), ("system", "5")):
                t = Terminal(cwd=live)
                t.until("train_gpu7")
                time.sleep(1)
                t.press(key)
                time.sleep(3)
                cpu, sent, begin = t.cpu(), t.bytes, time.perf_counter()
                time.sleep(a.seconds if key in "12" else a.seconds / 3)
                span = time.perf_counter() - begin
                rows.append(
                    (
                        f"8 live runs at 1 Hz, {name}: CPU",
                        f"{100 * (t.cpu() - cpu) / span:.1f} % of a core",
                        "2.5 %",
                    )
                )
                rows.append(
                    (
                        f"8 live runs at 1 Hz, {name}: to the terminal",
                        f"{(t.bytes - sent) / span / 1024:.2f} KiB/s",
                        "4 KiB/s",
                    )
                )
                t.close()
            stop.set()
            writer.join()
            t = Terminal(cwd=live)
            t.until("train_gpu7")
            time.sleep(4)
            cpu, sent, begin = t.cpu(), t.bytes, time.perf_counter()
            time.sleep(a.seconds / 3)
            span = time.perf_counter() - begin
            rows.append(
                (
                    "8 silent runs, overview: CPU, to the terminal",
                    f"{100 * (t.cpu() - cpu) / span:.1f} %, {(t.bytes - sent) / span / 1024:.2f} KiB/s",
                    "",
                )
            )
            t.close()
            for flag in ("--once", "--json", "--help"):
                times, before = [], resource.getrusage(resource.RUSAGE_CHILDREN)
                for _ in range(7):
                    begin = time.perf_counter()
                    command = [sys.executable, str(ROOT / "monitor.py"), flag]
                    subprocess.run(command, cwd=live, check=True, stdout=subprocess.DEVNULL)
                    times.append(time.perf_counter() - begin)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 7
                text = f"{statistics.median(times):.3f} s (CPU {cpu:.3f} s)"
                rows.append((f"8 runs: {flag} (median of 7)", text, "0.25 s"))
        finally:
            stop.set()
            for q in proc:
                q.kill()
                q.wait()

        text = fake.dump(fake.train_record(i, total=200_000) for i in range(1, 200_001))
        (tmp / "long").mkdir()
        (tmp / "long" / "metrics.jsonl").write_text(text)
        fleet = Fleet(tmp / "none", [tmp / "long"])
        begin = time.perf_counter()
        fleet.poll()
        while fleet.load_older(10):
            pass
        rows.append(
            (
                f"200,000 points ({len(text) / 1e6:.0f} MB of metrics.jsonl) read",
                f"{time.perf_counter() - begin:.2f} s",
                "",
            )
        )
        run = next(iter(fleet.runs.values()))
        for name, ui in (("one panel", Ui(view="run", panel=1)), ("four panels", Ui(view="run"))):
            ui.selected = run.name
            times = []
            for _ in range(9):
                begin = time.perf_counter()
                draw(fleet, ui, 120, 40)
                times.append(time.perf_counter() - begin)
            rows.append(
                (
                    f"200,000 points redrawn at 120x40, {name} (median of 9)",
                    f"{1e3 * statistics.median(times):.0f} ms",
                    "100 ms",
                )
            )
    print("| what | measured | wanted |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"\n{os.cpu_count()} cores; load average {load:.1f} then {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
