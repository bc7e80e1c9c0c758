"""A peer's worker process, seen from the driver: started, asked, stopped and continued."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

Reply = dict[str, Any]
PATIENCE_S = 1800.0
"""How long a worker may take for one request, on a busy machine too."""


class PeerFailed(Exception):
    """A worker failed, died or did not answer in time."""


class Worker:
    """One worker. It runs only while it is asked something: between, it is stopped (SIGSTOP).

    So whatever an engine's idle threads do, they take nothing from the one that is measured.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        """Starts the process."""
        self._log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                list(command),
                cwd=cwd,
                env=os.environ | dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._unread = b""

    def ask(self, request: Mapping[str, Any], timeout_s: float = PATIENCE_S) -> Reply:
        """Continues the worker, sends a request, waits for the reply and stops the worker.

        Raises:
            PeerFailed: The worker reports an error, is dead or is silent for too long.
        """
        self._signal(signal.SIGCONT)
        try:
            stdin = cast("IO[bytes]", self.process.stdin)
            stdin.write(json.dumps(dict(request)).encode() + b"\n")
            stdin.flush()
            reply: Reply = json.loads(self._line(timeout_s))
        except (BrokenPipeError, ValueError) as error:
            raise PeerFailed(self._last_words()) from error
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in reply:
            raise PeerFailed(reply["error"])
        return reply

    def _line(self, timeout_s: float) -> bytes:
        """The next line of the worker, read without a buffer that could hide it from select."""
        source = cast("IO[bytes]", self.process.stdout).fileno()
        end = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if not select.select([source], [], [], max(0.0, end - time.monotonic()))[0]:
                raise PeerFailed(f"no reply within {timeout_s:.0f} s")
            part = os.read(source, 1 << 16)
            if not part:
                raise PeerFailed(self._last_words())
            self._unread += part
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def close(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def _last_words(self) -> str:
        """How the worker ended, and the last line that it wrote."""
        try:
            code: object = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "none yet"
        lines = [x for x in self._log.read_text(errors="replace").splitlines() if x.strip()]
        return f"died (exit {code}): {lines[-1].strip() if lines else 'without a word'}"
