"""Peak memory of a piece of code, for the benchmarks of this folder."""

import threading
import time

import psutil


class PeakMemory:
    """Watches the process; `bytes` is its peak above what it held on entry.

    with PeakMemory() as peak:
        work()
    print(peak.bytes)
    """

    bytes = 0

    def __enter__(self):
        self.process, self.running = psutil.Process(), True
        self.before = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        """Sample every two milliseconds."""
        while self.running:
            self.bytes = max(self.bytes, self.process.memory_info().rss - self.before)
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
