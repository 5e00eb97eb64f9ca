"""Keeps a run alive: a worker process says what it begins, and its supervisor ends it if it hangs.

A kernel that waits for ever, or one that writes where it must not, takes its whole process with
it. The worker therefore names each thing before it runs it; if it then hangs or dies, the
supervisor writes down what was lost and starts another worker, which leaves that out.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

BROKEN = 3  # exit status of a worker whose GPU context is beyond use
FATAL = re.compile(
    "CUDA_ERROR_(ILLEGAL|LAUNCH|MISALIGNED|ASSERT|HARDWARE|INVALID_PC|INVALID_ADDRESS)|"
    "illegal memory access|misaligned address|unspecified launch failure|illegal instruction|"
    "device-side assert|invalid program counter|the launch timed out"
)
TICK = 0.2


class LostError(Exception):
    """An earlier worker was lost with this."""


class Journal:
    """What the worker runs now, and what was lost by earlier ones: key to reason."""

    def __init__(self, file: Path, lost: dict[str, str], patient: int = 2):
        self.file, self.lost, self.patient = file, lost, patient

    def begin(self, key: str) -> None:
        """Notes what comes next; raises `LostError` if it, or its like twice, was lost before."""
        if key in self.lost:
            raise LostError(self.lost[key])
        like = [reason for other, reason in self.lost.items() if _who(other) == _who(key)]
        if len(like) >= self.patient:
            raise LostError(f"left out after it was lost {len(like)} times: {like[-1]}")
        self.file.write_text(key)

    def judge(self, exception: Exception) -> None:
        """Ends the process if an exception says that nothing on this GPU can follow it."""
        if FATAL.search(str(exception)):
            self.file.write_text(f"{self.file.read_text()}\n{exception}"[:600])
            sys.stdout.flush()
            os._exit(BROKEN)  # not by way of threads that may still wait for the GPU


def _who(key: str) -> str:
    """Returns the contestant's part of a key "item | contestant"."""
    return key.rpartition(" | ")[2]


class End(NamedTuple):
    """How a worker ended: its exit status, and if it was lost, with what and why."""

    status: int
    key: str = ""
    reason: str = ""


def watch(command: Sequence[str], journal: Path, patience: float, seconds: float) -> End:
    """Runs a worker to its end, or ends it.

    Args:
      command: the worker's.
      journal: the file of its `Journal`.
      patience: seconds after which a worker that begins nothing new is ended.
      seconds: after which it is ended in any case.

    Returns:
      How it ended. A worker that ran out of `seconds` has status 0: what it wrote is kept.
    """
    journal.write_text("")
    worker, begun = subprocess.Popen(command), time.monotonic()
    while True:
        try:
            status = worker.wait(TICK)
            break
        except subprocess.TimeoutExpired:
            quiet = time.time() - journal.stat().st_mtime
            late = time.monotonic() - begun > seconds
            if late or quiet > patience:
                worker.kill()
                worker.wait()
                if late:
                    return End(0)
                return End(1, journal.read_text(), f"nothing came back in {patience:.0f} s")
    key, _, reason = journal.read_text().partition("\n")
    if status in (0, 2):
        return End(status)
    return End(status, key, reason or f"the process ended with status {status}")


def supervise(start: Callable[[], End], state: Path, most: int = 30) -> int:
    """Starts workers until one ends well; returns the exit status.

    Args:
      start: runs a worker that continues what `state` holds.
      state: the worker's JSON, in which `lost` is filled in.
      most: how many workers are lost at most.
    """
    for _ in range(most):
        end = start()
        if end.status in (0, 2) or not end.key:
            return end.status
        print(f"lost: {end.key}: {end.reason}", flush=True)
        if not state.exists():
            return end.status
        result = json.loads(state.read_text())
        result["lost"][end.key] = end.reason
        state.write_text(json.dumps(result))
    return 1
