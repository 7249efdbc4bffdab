"""Workers as threads of a test's own process, without the seconds in which a new one imports torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from submission.calls.supervisor import Carrier, Message, Worker
from submission.calls.worker import Inbox, Loadable, Outbox, load, work


class Threads(Carrier):
    """What `submission.calls.processes.Processes` does, but for ends and kills."""

    def __init__(self, shares: Sequence[tuple[Loadable, Mapping[str, str]]]) -> None:
        self.count = len(shares)
        self._shares = shares
        self._inbox: SimpleQueue[tuple[Worker, Message]] = SimpleQueue()

    def start(self, worker: Worker) -> None:
        """See `Carrier`."""
        worker.handle = inbox = Inbox()

        def be() -> None:
            outbox = Outbox(lambda message: self._inbox.put((worker, message)))
            backend, wrong = load(self._shares[worker.number][0])
            outbox.put(("refused", wrong) if wrong else ("ready", 0))
            if not wrong:
                work(backend, inbox, outbox.put)

        threading.Thread(target=be, daemon=True).start()

    def send(self, worker: Worker, message: Message) -> None:
        """See `Carrier`."""
        worker.handle.take(message)

    def receive(self, workers: Sequence[Worker], seconds: float) -> Iterator[tuple[Worker, Message | None]]:
        """See `Carrier`."""
        del workers
        with suppress(Empty):
            yield self._inbox.get(timeout=max(0.0, seconds))

    def end(self, worker: Worker) -> str:
        """See `Carrier`."""
        return f"worker {worker.number} was ended"
