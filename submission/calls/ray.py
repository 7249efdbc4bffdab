"""Workers as actors of a Ray cluster: Ray places them, carries their messages and watches them.

    python -m submission predict test.csv -o submission.csv --ray local --workers 4
    python -m train rewrites prompts.csv texts.csv -o triplets.csv --ray 10.0.0.1:6379 --workers 16

An actor that dies with its node is started elsewhere; where there is no room for it, the others do its work.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TextIO, cast

from submission.backends import ModelSpec
from submission.backends.hardware import Placement
from submission.calls.shares import one_of
from submission.calls.supervisor import Carrier, Message, Worker
from submission.calls.worker import Inbox, Outbox, load, work
from submission.errors import DeviceLostError, MissingExtra, UserError, first_line

_CONNECT_SECONDS = 5.0
_PLACE_SECONDS = 15.0  # for an actor to find room
_AGAIN_SECONDS = 120.0  # for one that takes a lost one's place: nodes come back, and what they held is free late
_TOLD_SECONDS = 0.1  # that messages wait for each other: one costs a millisecond, whatever is in it
_PORT, _CLIENT_PORT = 6379, 10001


class ActorBody:
    """What runs on the cluster: `serve` runs as long as the actor does, the others beside it."""

    def __init__(self) -> None:
        self._inbox = Inbox()

    def node(self) -> str:
        """Where it runs."""
        return socket.gethostname()

    def process(self) -> int:
        """The id of its process."""
        return os.getpid()

    def take(self, message: Message) -> None:
        """Take a message."""
        self._inbox.take(message)

    def serve(self, spec: ModelSpec) -> Iterator[list[Message]]:
        """Load the model and answer, for ever; yields what is to be told."""
        backend, wrong = load(spec)
        yield [("refused", f"on node {self.node()}: {wrong}") if wrong else ("ready", self.node())]
        if wrong:
            return
        told: SimpleQueue[Message] = SimpleQueue()
        outbox = Outbox(told.put)
        threading.Thread(target=self._work, args=(backend, outbox), daemon=True).start()
        while True:
            group = [told.get()]
            with suppress(Empty):
                while True:
                    group.append(told.get(timeout=_TOLD_SECONDS))
            yield group

    def _work(self, backend: Any, outbox: Outbox) -> None:
        try:
            work(backend, self._inbox, outbox.put)
        except DeviceLostError:  # the supervisor ends this actor as soon as it is told
            outbox.close()


@dataclass(slots=True, eq=False)
class _Actor:
    actor: Any
    told: Any  # the stream of what it tells
    placed: Any  # becomes ready when it runs somewhere
    until: float


class Actors(Carrier):
    """Actors that each load a model.

    Args:
        spec: the model; its path must be there on every node.
        placement: how many and where.

    Raises:
        UserError: no cluster, another version of Ray or Python there, or too few resources; said within seconds.
    """

    def __init__(self, spec: ModelSpec, placement: Placement) -> None:
        self._ray = ray = connect(placement)
        there = ray.cluster_resources()
        gpus = placement.gpus if placement.gpus is not None else (1.0 if there.get("GPU", 0) else 0.0)
        self.count = placement.workers or max(1, int(there.get("GPU", 0)))
        largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1)
        cpus = placement.cpus or max(1, min(int(there.get("CPU", 1)) // self.count, largest))
        for name, each in (("CPU", cpus), ("GPU", gpus)):
            if each * self.count > there.get(name, 0):
                raise UserError(
                    f"{self.count} workers of {each:g} {name}s are too many for this cluster, which has "
                    f"{there.get(name, 0):g}: lower --workers or the {name}s of each"
                )
        self._takes = f"{cpus} CPUs, {gpus:g} GPUs each"
        self._spec = one_of(spec, threads=cpus)
        self._served = False
        # `serve` never ends; the others come in beside it.
        self._make = ray.remote(num_cpus=cpus, num_gpus=gpus, max_concurrency=4, max_restarts=0)(ActorBody)

    def start(self, worker: Worker) -> None:
        """See `Carrier`."""
        actor = self._make.remote()
        told = actor.serve.options(num_returns="streaming").remote(self._spec)
        patience = _AGAIN_SECONDS if self._served else _PLACE_SECONDS
        worker.handle = _Actor(actor, told, actor.node.remote(), time.monotonic() + patience)

    def send(self, worker: Worker, message: Message) -> None:
        """See `Carrier`."""
        worker.handle.actor.take.remote(message)

    def receive(self, workers: Sequence[Worker], seconds: float) -> Iterator[tuple[Worker, Message | None]]:
        """See `Carrier`."""
        by_stream = {worker.handle.told: worker for worker in workers}
        ready, _ = self._ray.wait(list(by_stream), num_returns=1, timeout=max(0.0, seconds))
        for stream in ready:
            worker = by_stream[stream]
            try:
                messages = self._ray.get(next(stream))
            except (StopIteration, self._ray.exceptions.RayError):
                yield worker, None
                continue
            self._served = True
            for message in messages:
                yield worker, message
        for worker in workers:
            if not worker.ready and worker.handle.placed is not None and not self._placed(worker.handle):
                yield (
                    worker,
                    (
                        "refused",
                        f"the cluster has no room for worker {worker.number} now ({self._takes}): "
                        "others use it; wait, or ask for less",
                    ),
                )

    def end(self, worker: Worker) -> str:
        """See `Carrier`."""
        # Where Ray is gone already, a call to it would connect again, and hang.
        if worker.handle is not None and self._ray.is_initialized():
            with suppress(Exception):
                self._ray.kill(worker.handle.actor)
        return f"worker {worker.number} on the cluster died"

    def _placed(self, actor: _Actor) -> bool:
        """Whether an actor runs somewhere, or may still find room."""
        if self._ray.wait([actor.placed], timeout=0)[0]:
            actor.placed = None
            return True
        return time.monotonic() < actor.until


def connect(placement: Placement) -> Any:
    """The module ray, connected to the cluster.

    Raises:
        UserError: there is none at that address, or it runs another version.
        MissingExtra: Ray is not installed.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # what is held back is printed by our own thread: see _WithoutRay
    try:
        import ray
    except ImportError:
        raise MissingExtra("--ray", "ray", "ray") from None
    if ray.is_initialized():
        return ray
    if not isinstance(sys.stdout, _WithoutRay):
        sys.stdout = cast(TextIO, _WithoutRay(sys.stdout))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no network but the cluster's
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    more: dict[str, Any] = {}
    if placement.ray == "local":
        more = {
            "num_cpus": max(os.cpu_count() or 1, placement.workers * max(1, placement.cpus)),
            "include_dashboard": False,
        }
    elif placement.ray != "auto":
        _check_reachable(placement.ray)
    failed: list[Exception] = []

    def start() -> None:
        try:
            ray.init(address=placement.ray, log_to_driver=False, logging_level=logging.ERROR, **more)
        except Exception as error:
            failed.append(error)

    if placement.ray == "local":
        start()  # in this thread: what it starts is ended with the thread
        if failed:
            raise UserError(f"--ray local: {_about(failed[0])}")
        return ray
    # In a thread, since a cluster that takes the connection and does not answer would hold us for minutes.
    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(_PLACE_SECONDS)
    if failed:
        raise UserError(f"--ray {placement.ray}: {_about(failed[0])}")
    if thread.is_alive():
        raise UserError(f"--ray {placement.ray} does not answer: is it the address of `ray start --head`?")
    return ray


class _WithoutRay:
    """Standard output, which a program may read, without what Ray's threads print there of the cluster: that goes to
    standard error.
    """

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def write(self, text: str) -> int:
        """As of a text file."""
        of_ray = threading.current_thread().name.startswith("ray_")
        return (sys.stderr if of_ray else self._output).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


def _check_reachable(address: str) -> None:
    host, _, port = address.removeprefix("ray://").partition(":")
    usual = _CLIENT_PORT if address.startswith("ray://") else _PORT
    try:
        socket.create_connection((host, int(port or usual)), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--ray {address}: no cluster answers there ({first_line(error)})\n"
            "Start one with `ray start --head`, which tells its address, or use --ray local."
        ) from None


def _about(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "ersion mismatch" in str(error):
        return "the cluster runs another version of Ray or Python: " + " ".join(lines)[:300]
    return first_line(error)
