"""Warm: trying again: what is worth it, how often, and after which pause."""

from __future__ import annotations

import random
import time

from rootless.oci.pace import Patience
from rootless.oci.transport import TransportError


class Attempts:
    """Counts the failures of one act. Progress in between makes the count start anew."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._failures = 0
        self._spent = 0.0

    def progress(self) -> None:
        """Forget the failures so far: there was enough progress since then."""
        self._failures, self._spent = 0, 0.0

    def failed(self, error: TransportError) -> None:
        """Wait before the next try, or raise `error` when there shall be none.

        Who answers too slowly has cost much time: that is tried twice, not five times.
        """
        slow = error.code == "registry-timeout"
        if not error.again or not self.next(weight=self._patience.tries / 2 if slow else 1):
            raise error

    def next(self, weight: float = 1, asked: float = 0.0) -> bool:
        """Wait before the next try, at least the seconds that were `asked` for; False when there shall be none."""
        self._failures += 1
        self._spent += weight
        if self._spent >= self._patience.tries or asked > self._patience.retry_after:
            return False
        # Many pulls of one image must not come back as one. And there is no event to wait for: HTTP has none.
        grown = self._patience.backoff * 2 ** (self._failures - 1) * random.uniform(0.75, 1.25)
        time.sleep(max(asked, grown))
        return True
