"""A model held by actors of a Ray cluster: the same worker, with Ray to place it, carry its messages and watch it.

    python -m submission predict test.csv -o submission.csv --ray local --workers 4
    python -m train rewrites prompts.csv texts.csv -o triplets.csv --ray 10.0.0.1:6379 --workers 16

The journal, the deadline and the fallback stay with the driver. An actor that dies with its node is started elsewhere;
where there is no room for it, the others do its work.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, cast

from submission.errors import MissingExtra, UserError, first_line
from submission.calls.fleet import Event, Inbox, Member, Method, Spread, divided, gathered, load_words, work
from submission.backends.hardware import Fleet
from submission.progress import say

if TYPE_CHECKING:
    from submission.backends import ModelSpec

_CONNECT_SECONDS = 5.0
_PLACE_SECONDS = 15.0  # for an actor to find room
_PORT, _CLIENT_PORT = 6379, 10001


@dataclass(slots=True, eq=False)
class Actor(Member):
    """An actor's handle, the stream of what it tells, and the task that becomes ready when its model is loaded."""

    handle: Any = field(init=False)
    told: Any = field(init=False)


class Worker:
    """What runs on the cluster: holds a `Backend`; `serve` runs as long as the actor does, the others beside it."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._backend: Any = None

    def node(self) -> str:
        """Where it runs."""
        return socket.gethostname()

    def process(self) -> int:
        """The id of its process."""
        return os.getpid()

    def load(self, spec: ModelSpec) -> str:
        """Load the model; returns what is wrong, or nothing."""
        try:
            self._backend = spec.load()
        except Exception as error:
            return f"on node {self.node()}: {load_words(error)}"
        return ""

    def put(self, call: int, method: Method, items: list[Any]) -> None:
        """Take requests."""
        self._inbox.put(call, method, items)

    def stop(self, call: int) -> None:
        """Give a call up."""
        self._inbox.stopped = call

    def serve(self) -> Iterator[list[Event]]:
        """Answer, for ever."""
        yield from gathered(work(self._backend, self._inbox))


class _DiedError(UserError):
    """A worker died before it was ready."""


class Cluster(Spread[Actor]):
    """A `Backend` of actors with a copy of the model each.

    Args:
        spec: the model; its path must be there on every node.
        fleet: how many and where.

    Raises:
        UserError: no cluster, another version of Ray or Python there, too few resources, or a model that is missing on
            a node; said within seconds.
    """

    def __init__(self, spec: ModelSpec, fleet: Fleet) -> None:
        super().__init__()
        ray = connect(fleet)
        self._ray = ray
        there = ray.cluster_resources()
        gpus = fleet.gpus if fleet.gpus is not None else (1.0 if there.get("GPU", 0) else 0.0)
        count = fleet.workers or max(1, int(there.get("GPU", 0)))
        largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1)
        cpus = fleet.cpus or max(1, min(int(there.get("CPU", 1)) // count, largest))
        for name, each in (("CPU", cpus), ("GPU", gpus)):
            if each * count > there.get(name, 0):
                raise UserError(
                    f"{count} workers of {each:g} {name}s are too many for this cluster, which has "
                    f"{there.get(name, 0):g}: lower --workers or the {name}s of each"
                )
        self._spec = divided(spec, 1, cpus)
        # Four threads: `serve` never ends, `put`, `stop` and `node` come in beside it.
        self._make = ray.remote(num_cpus=cpus, num_gpus=gpus, max_concurrency=4, max_restarts=0)(Worker)
        self.members = [Actor(number) for number in range(count)]
        for member in self.members:
            self._start(member)
        loading = {member: member.handle.load.remote(self._spec) for member in self.members}
        self.members = self._placed(self.members)
        each_takes = f"{cpus} CPUs, {gpus:g} GPUs each"
        if not self.members:
            raise UserError(
                f"the cluster has no room for a worker now ({each_takes}): others use it; wait, or ask for less"
            )
        if len(self.members) < count:
            say(f"the cluster has room for {len(self.members)} of {count} workers now ({each_takes}): they begin")
        for member in list(self.members):
            try:
                self._loaded(member, loading[member])
            except _DiedError as error:
                self.members.remove(member)
                if not self.members:
                    raise
                say(f"{error}: the others begin")

    def close(self) -> None:
        """End the actors; a cluster that was started for this run ends with the process."""
        if not self._ray.is_initialized():  # the process ends: a call to Ray would connect again, and hang
            return
        for member in self.members:
            with suppress(Exception):
                self._ray.kill(member.handle)

    def _ask(self, member: Actor, call: int, method: Method, items: Sequence[Any]) -> None:
        member.handle.put.remote(call, method, list(items))

    def _stop(self, member: Actor, call: int) -> None:
        member.handle.stop.remote(call)

    def _listen(self, members: Sequence[Actor]) -> Iterator[tuple[Actor, Event | None]]:
        by_stream = {member.told: member for member in members}
        ready, _ = self._ray.wait(list(by_stream), num_returns=1)
        for stream in ready:
            member = by_stream[stream]
            try:
                events = self._ray.get(next(stream))
            except (StopIteration, self._ray.exceptions.RayError):
                yield member, None
                continue
            for event in events:
                yield member, event

    def _replace(self, member: Actor) -> str:
        words = f"worker {member.number} on the cluster died"
        self._start(member)
        loaded = member.handle.load.remote(self._spec)
        why = "there is no room for another"
        if self._placed([member]):
            try:
                self._loaded(member, loaded)
            except UserError as error:  # its node died as well, or is out of memory
                why = first_line(error)
                self._ray.kill(member.handle)
            else:
                say(f"{words}: another took its place")
                return words
        self.members.remove(member)
        if not self.members:
            raise UserError(f"{words}, and none is left ({why}): start more nodes and run the same command again")
        say(f"{words}, and {why}: {len(self.members)} are left")
        return words

    def _start(self, member: Actor) -> None:
        member.handle = self._make.remote()

    def _placed(self, members: Sequence[Actor]) -> list[Actor]:
        """Those of these actors that run somewhere, soon; the others are ended."""
        asked = {member.handle.node.remote(): member for member in members}
        self._ray.wait(list(asked), num_returns=len(asked), timeout=_PLACE_SECONDS)
        found = []
        for where, member in asked.items():
            try:
                self._ray.get(where, timeout=0)
                found.append(member)
            except self._ray.exceptions.RayError:
                self._ray.kill(member.handle)
        return found

    def _loaded(self, member: Actor, loaded: Any) -> None:
        try:
            wrong = self._ray.get(loaded)
        except self._ray.exceptions.RayError as error:
            raise _DiedError(f"worker {member.number} died while it loaded the model: {first_line(error)}") from None
        if wrong:
            raise UserError(wrong)
        member.told = member.handle.serve.options(num_returns="streaming").remote()


def connect(fleet: Fleet) -> Any:
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
    if fleet.ray == "local":
        more = {"num_cpus": max(os.cpu_count() or 1, fleet.workers * max(1, fleet.cpus)), "include_dashboard": False}
    elif fleet.ray != "auto":
        _check_reachable(fleet.ray)
    failed: list[Exception] = []

    def start() -> None:
        try:
            ray.init(address=fleet.ray, log_to_driver=False, logging_level=logging.ERROR, **more)
        except Exception as error:
            failed.append(error)

    if fleet.ray == "local":
        start()  # in this thread: what it starts is ended with the thread
        if failed:
            raise UserError(f"--ray local: {_about(failed[0])}")
        return ray
    # In a thread, since a cluster that takes the connection and does not answer would hold us for minutes.
    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(_PLACE_SECONDS)
    if failed:
        raise UserError(f"--ray {fleet.ray}: {_about(failed[0])}")
    if thread.is_alive():
        raise UserError(f"--ray {fleet.ray} does not answer: is it the address of `ray start --head`?")
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
