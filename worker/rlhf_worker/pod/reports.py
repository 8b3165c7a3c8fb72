"""The run's progress, in `status.progress` of its own RLHFJob; and what the answers ask of the driver.

Reports are sent by a thread of their own: an API server that is away costs a report and never a step.
"""

import os
import sys
import threading
import time
from typing import Any

from rlhf_api.progress import EXIT_OK, HEARTBEAT_SECONDS
from rlhf_api.run import RunConfig
from rlhf_worker.pod.job import OwnJob, Raw, drains, ended, last_progress, pods_ready
from rlhf_worker.progress import Reporter, now
from rlhf_worker.stop import Stop
from rlhf_worker.weights.sync import Synced

LEAST_SECONDS = 1.0  # between two reports, however short the steps are
LAST_REPORT_SECONDS = 15.0
END_SECONDS = 30.0  # from the end of the job to that of a driver that hangs


class StatusReporter(Reporter):
    """Server-side apply of the progress: at each step end, every HEARTBEAT_SECONDS, at most once in LEAST_SECONDS.

    The answer to each report says whether the job still wants this driver. One that does not end by itself is ended.
    """

    def __init__(self, config: RunConfig, own: OwnJob, seen: Raw, stop: Stop, pod_uid: str) -> None:
        """seen: the job as it was when the driver started."""
        super().__init__(config, last_progress(seen))
        self.progress = self.progress.model_copy(update={"pod_uid": pod_uid or None})
        self._own, self._stop, self._over = own, stop, False
        self._look_at(seen)
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
        self._thread.start()

    def update(self, synced: Synced | None = None, **fields: Any) -> None:
        super().update(synced, **fields)
        self._news.set()

    def close(self) -> None:
        """Deliver the last report, or give up after LAST_REPORT_SECONDS."""
        self._closing.set()
        self._news.set()
        self._thread.join(LAST_REPORT_SECONDS)

    def _work(self) -> None:
        failures = 0
        while True:
            self._news.wait(HEARTBEAT_SECONDS)
            closing = self._closing.is_set()
            self._news.clear()
            failures = 0 if self._send() else failures + 1
            if closing and (not failures or failures > 2):
                return
            if failures:
                self._news.set()
            self._closing.wait(LEAST_SECONDS * min(10, 2**failures)) if not closing else time.sleep(LEAST_SECONDS)

    def _send(self) -> bool:
        if self._bounded:
            self.active()
        body = {"progress": {**self.progress.to_dict(), "reportTime": now()}}
        try:
            self._look_at(self._own.apply(body))
        except Exception as error:  # whatever an answer holds: without this thread nobody hears of the run any more
            print(f"progress could not be reported: {error}", file=sys.stderr, flush=True)
            return False
        return True

    def _look_at(self, answer: Raw | None) -> None:
        if (why := ended(answer, self._own.job)) or answer is None:
            self._end(str(why))
            return
        self.drain, self.pods_ready = drains(answer), pods_ready(answer)

    def _end(self, why: str) -> None:
        """Nothing that this process still makes is wanted: a main thread that hangs is not waited for."""
        if self._over:
            return
        self._over, self.drain = True, False
        self._stop.end(why)
        ender = threading.Timer(END_SECONDS, _end_hard, [why])
        ender.daemon = True
        ender.start()


def _end_hard(why: str) -> None:
    words = f"what the driver did at that time did not end in {END_SECONDS:g} s"
    print(f"ended: {why}; {words}", file=sys.stderr, flush=True)
    os._exit(EXIT_OK)
