"""The processes of one training, started by torchrun on one machine or more: which one this is, what all must
have in common before the first step, who goes first, and one end for all.

A process that ends with an error leaves the others waiting for it in their next collective operation, perhaps
for ever. So it tells all why (`end_all`, called by cli.guarded) through the key-value store that torchrun
keeps on the first machine; a thread of each process looks there once a second.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .cli import UserError, complain, note_exit, pick_device
from .workers import end_with_parent

PATIENCE = timedelta(hours=1)  # in a collective operation: a slow disk, rank 0 writing or speaking a sample
REACH_S = 60  # to reach the store at the beginning
REACH_AGAIN_S = 15
LOOK_S = 1.0  # between two looks at the store
SILENT_LOOKS = 600  # without a beat of a process that another one waits for: it is dead
ENDING = threading.Event()  # this process is about to leave
OVER = threading.Event()  # its interpreter is about to go down
ENDED = "ended"  # key of the store: who ended first, and why
LEAVE_S = 300  # for a checkpoint after torchrun itself has died

# Options that may differ from machine to machine: what lies in the folders is compared instead.
LOCAL = ("device", "num_workers", "prefetch", "config", "resume", "data_root", "allow_links",
         "pretrained_model", "phase10_checkpoint", "start_checkpoint", "data", "val_data", "eval_decoder",
         "eval_outdir")  # fmt: skip


def env(name: str, default: int = 0) -> int:
    return int(os.environ.get(name, default))


def connect(seconds: float = REACH_S):
    """A connection to the store (one serves one thread). Raises RuntimeError where nobody answers."""
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun; else rank 0 does
    where, serve = (os.environ["MASTER_ADDR"], env("MASTER_PORT")), not served and env("RANK") == 0
    how = {"timeout": timedelta(seconds=seconds), "wait_for_workers": False, "multi_tenant": True}
    store = dist.TCPStore(*where, is_master=serve, **how)
    return dist.PrefixStore(f"snac48/{env('TORCHELASTIC_RESTART_COUNT')}", store)


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int  # processes
    device: torch.device
    store: dist.Store | None = None  # None: one process

    def reduce_sum(self, values):
        """Sums over all ranks, on the CPU: a tensor gives a tensor, a list gives a list of floats."""
        if not torch.is_tensor(values):
            return self.reduce_sum(torch.tensor(values, dtype=torch.float64)).tolist()
        if self.world == 1:
            return values
        shared = values.to(self.device)
        dist.all_reduce(shared)
        return shared.cpu()

    def sum_gradients(self, parameters: list) -> None:
        """Of what is not in DDP: every rank's gradients become the sum of all ranks'."""
        if self.world == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        summed = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(summed)
        for p, part in zip(parameters, summed.split([g.numel() for g in grads])):
            p.grad = part.view_as(p)

    def barrier(self) -> None:
        """Until all ranks have come here."""
        self.reduce_sum([0.0])

    def in_step(self, module):
        """The module as training calls it: of several processes in DDP, which averages their gradients."""
        if self.world == 1:
            return module
        gpu = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(module, device_ids=gpu)

    def own_gradients(self, module, last: bool):
        """For the micro-batches of a step: only the last one's backward averages what all have added up."""
        return contextlib.nullcontext() if last or self.world == 1 else module.no_sync()

    def wait(self, key: str, owner: int) -> None:
        """Until rank `owner` has set `key`, days if need be. Raises UserError where that process has died."""
        beats, silent, pause = None, 0, LOOK_S / 50
        while not self.store.check([key]):
            now = self.store.add(f"beats {owner}", 0)
            beats, silent = now, silent + 1 if now == beats else 0
            if silent > SILENT_LOOKS:
                raise UserError(f"rank {owner} has died without a word: see the log of its machine")
            time.sleep(pause)
            pause = min(LOOK_S, 1.5 * pause)

    @contextlib.contextmanager
    def in_turn(self, name: str):
        """Rank 0 does the block first, then the first rank of each other machine, then all others: what one
        of them builds (an index beside the data), the later ones find."""
        if self.world > 1 and self.rank:
            before = 0 if env("LOCAL_RANK") == 0 else self.rank - env("LOCAL_RANK")
            self.wait(f"{name} {before}", before)
        yield
        if self.world > 1:
            self.store.set(f"{name} {self.rank}", "done")

    def agree(self, args, saved: dict | None, facts: dict) -> None:
        """Returns when all ranks have the same facts, the same checkpoint (`saved`, or none) and the same
        options, but for LOCAL ones and folders. Else rank 0 raises a UserError that names what differs, and
        with it all end."""
        if self.world == 1:
            return
        step, weights = (saved["global_step"], [*saved["model"].values()]) if saved else (0, [])
        if saved and "adversarial" in saved:
            weights += saved["adversarial"]["model"].values()
        facts |= {"the checkpoint": fingerprint(*(w.cpu().numpy() for w in weights)) if saved else "none"}
        facts = {"the step to begin at": step} | facts
        options = {f"--{k}": v for k, v in vars(args).items() if k not in LOCAL and not k.endswith("_dir")}
        mine = {k: str(v) for k, v in (facts | options).items()} | {"host": socket.gethostname()}
        self.store.set(f"facts {self.rank}", json.dumps(mine))
        if self.rank:
            return self.wait("agreed", 0)
        theirs = {}
        for rank in range(1, self.world):
            self.wait(f"facts {rank}", rank)
            theirs[rank] = json.loads(self.store.get(f"facts {rank}"))
        if differ := differences(mine, theirs):
            todo = "start the same command on every machine, in folders that all of them share"
            raise UserError(f"not all processes begin the same run: {'; '.join(differ)}; {todo}")
        self.store.set("agreed", "yes")


def differences(mine: dict, theirs: dict[int, dict]) -> list[str]:
    """What ranks have otherwise than rank 0, at most three of the facts of each machine, as phrases."""
    found = defaultdict(list)  # (host, phrase) -> ranks
    for rank, facts in theirs.items():
        differ = [k for k in mine if k != "host" and facts.get(k) != mine[k]]
        phrases = [f"{k} is {facts.get(k)}, {mine[k]} on rank 0" for k in differ[:3]]
        if phrases:
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            found[facts["host"], ", ".join(phrases) + more].append(str(rank))
    return [f"on {host} (rank {', '.join(ranks)}) {phrase}" for (host, phrase), ranks in found.items()] + (
        [f"rank 0 is on {mine['host']}"] if found else []
    )


def fingerprint(*arrays_and_texts) -> str:
    """crc32 of numpy arrays and texts: what machines compare of their data."""
    value = 0
    for item in arrays_and_texts:
        value = zlib.crc32(item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item, value)
    return f"{value:08x}"


# ---- one beginning ----


def join(device: str) -> Ranks:
    """This process among those of torchrun, on its GPU or on the CPU; alone without torchrun."""
    chosen, rank, world = pick_device(device), env("RANK"), env("WORLD_SIZE", 1)
    if world == 1:
        return Ranks(0, 1, chosen)
    try:
        store, threads = connect(), connect()
    except RuntimeError:
        raise UserError(gone()) from None
    end_with_parent(signal.SIGTERM)  # torchrun: with a checkpoint, as if it had been told to stop
    watcher = threading.Thread(target=watch, args=(threads,), daemon=True)
    watcher.start()
    # a thread that is in C++ while the interpreter goes down would abort the process
    atexit.register(lambda: (OVER.set(), watcher.join(REACH_AGAIN_S)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(rank, world, chosen, store)


def joined() -> bool:
    return dist.is_initialized()


def gone() -> str:
    return f"torchrun on {os.environ['MASTER_ADDR']} has ended: the log of that machine says why"


# ---- one end ----


def end_all(sentence: str, code: int) -> str:
    """Tell all processes of this training why it ends, and with which exit code, and give them time to read
    it. Returns what this one has to say: nothing where the log of its machine has it already."""
    ENDING.set()
    me = {"rank": env("RANK"), "host": socket.gethostname(), "node": env("GROUP_RANK"), "code": code}
    me |= {"sentence": sentence, "pid": os.getpid()}
    try:
        first = json.loads(connect().compare_set(ENDED, "", json.dumps(me)))
    except RuntimeError:  # torchrun has gone: nobody to tell
        return sentence
    time.sleep(3 * LOOK_S)  # before torchrun, which keeps the store, ends because we do
    return sentence if first == me else last_words(first)


def last_words(first: dict) -> str:
    """Of an end that another process began: once a machine, and not where that process has said it."""
    if first["node"] == env("GROUP_RANK") or env("LOCAL_RANK"):
        return ""
    return f"rank {first['rank']} on {first['host']} has ended: {first['sentence']}"


def watch(store) -> None:
    """In a thread of every process: show that it lives, and end it when another one ends with an error."""
    while not OVER.wait(LOOK_S):
        try:
            store.add(f"beats {env('RANK')}", 1)
            first = json.loads(store.get(ENDED)) if store.check([ENDED]) else None
        except RuntimeError:  # a broken connection, or torchrun was killed
            try:
                store = connect(REACH_AGAIN_S)
            except RuntimeError:
                return outlive()
            continue
        if first and first["pid"] == os.getpid() and first["rank"] == env("RANK"):
            return  # our own: the main thread ends
        if first:
            leave_at_once(last_words(first), first["code"])


def outlive() -> None:
    """torchrun itself was killed: stop with a checkpoint instead of going on as a ghost."""
    os.kill(os.getpid(), signal.SIGTERM)  # as if torchrun had been told to stop
    time.sleep(LEAVE_S)
    leave_at_once(gone() if env("LOCAL_RANK") == 0 else "", 1)


def leave_at_once(sentence: str, code: int) -> None:
    """Exit though the main thread waits in a collective operation that never ends."""
    ENDING.set()
    note_exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        if sentence:  # now: torchrun ends this process as soon as another one of its machine has left
            complain(f"error: {sentence}")
    time.sleep((5 if env("LOCAL_RANK") else 3) * LOOK_S)  # as in end_all; the one that speaks leaves first
    os._exit(code)
