"""How much memory this process uses, and used at its peak (Linux)."""

import threading
import time
from pathlib import Path


def memory_status(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, RssAnon, VmHWM."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


class PeakMemory:
    """Growth of this process's memory to its peak while the block runs, in bytes.

    with PeakMemory() as peak:
        ...
    peak.resident    # all of it, as the kernel counts: also pages of mapped files, which it may drop at any time
    peak.allocated   # without those, looked at every 2 ms
    """

    def __enter__(self) -> "PeakMemory":
        self.resident = self.allocated = 0
        self._stopped = threading.Event()
        self._before = {name: memory_status(name) for name in ("VmRSS", "RssAnon")}
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what is used now
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self._thread.join()
        self.resident = memory_status("VmHWM") - self._before["VmRSS"]

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self.allocated = max(self.allocated, memory_status("RssAnon") - self._before["RssAnon"])
            time.sleep(0.002)
