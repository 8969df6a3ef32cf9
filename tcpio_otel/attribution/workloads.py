"""Connections to workloads: each is a container, a unit, or a program of the host, and becomes a Resource of its own.

A workload has a number, which the connection table's flows carry; 0 stands for whatever nobody can name. Numbers are
given back once no connection has them any more, and used again a good while later.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import native
from tcpio_otel.attribution.cgroups import Cgroups
from tcpio_otel.attribution.naming import UNKNOWN, Place, Workload
from tcpio_otel.attribution.pods import Pod, attributes_of
from tcpio_otel.batch import Batch, Kind, pick

Flows = NDArray[np.void]

PLACING_NS = 5_000_000_000
"""For how long a connection's cgroup is looked for."""

TIDY_NS = 60_000_000_000
IDLE_NS = 600_000_000_000
"""How often workloads without connections are looked for, and for how long one keeps its number: what is on its way
to a receiver still names it."""


class Pods(Protocol):
    """Where pods are known: `kubernetes.NodePods`. `version` rises when there is more to know."""

    @property
    def version(self) -> int:
        """Rises with every change."""

    def __getitem__(self, uid: str) -> Pod | None:
        """A pod; None while it is not known."""


class _Unplaced(NamedTuple):
    slot: int
    born: int
    until_ns: int


class Workloads:
    """The workloads of this host's connections.

    Args:
        cgroups: of this host.
        pods: of this node; None: nobody is asked.
        wait_ns: how long what a pod's containers sent and received waits for the pod to be known.
    """

    def __init__(self, cgroups: Cgroups, pods: Pods | None = None, wait_ns: int = 0) -> None:
        self._cgroups, self._pods, self._wait_ns = cgroups, pods, wait_ns
        self._pods_version = -1
        self._unknown: dict[int, int] = {}  # numbers of which the pod is not known, and until when somebody waits
        self._workloads: list[Workload] = [UNKNOWN]
        self._numbers: dict[tuple[Place, str], int] = {}  # a container has no program here
        self._used_ns: list[int] = [0]
        self._free: list[int] = []
        self._found_before: dict[tuple[int, int, bytes], int] = {}  # by cgroups and program, while these mean the same
        self._unplaced: list[_Unplaced] = []
        self._tidied_ns = 0
        self._counts = np.zeros(1, np.int32)
        self._found = np.empty(1, np.int32)
        self._of = np.empty(0, np.int32)

    def __getitem__(self, number: int) -> Workload:
        return self._workloads[number]

    def ready(self, number: int) -> bool:
        """Whether there is nothing more to wait for."""
        return number not in self._unknown

    def __len__(self) -> int:
        """How many are known, the unknown one included."""
        return len(self._workloads) - len(self._free)

    def assign(self, batch: Batch, flows: Flows, slots: Iterable[int]) -> None:
        """Note in `flows` the workload of each of `slots`, and of those for which it was not known so far.

        Args:
            batch: what the slots were learnt from; its records of kind CGROUP are taken in first.
            flows: of the connection table (dtype FLOW).
            slots: those whose process has changed.
        """
        now_ns = batch.now_ns
        if len(batch.packets) != len(batch):
            made = batch.records["kind"] == Kind.CGROUP
            if made.any():
                self._cgroups.learn(pick(batch.records, made), now_ns)
                self._found_before.clear()
        self._ask(now_ns)
        for slot, born in self._assign(flows, list(slots), now_ns):
            self._unplaced.append(_Unplaced(slot, born, now_ns + PLACING_NS))
        if self._cgroups.refresh(now_ns, asked=bool(self._unplaced)):
            self._found_before.clear()
            waiting = {one.slot: one for one in self._unplaced if flows["born"][one.slot] == one.born}
            unplaced = self._assign(flows, list(waiting), now_ns)
            self._unplaced = [waiting[slot] for slot, _ in unplaced if now_ns < waiting[slot].until_ns]
        if now_ns - self._tidied_ns >= TIDY_NS:
            self._tidy(flows, now_ns)

    def _assign(self, flows: Flows, slots: list[int], now_ns: int) -> list[tuple[int, int]]:
        """Find the workloads of slots; returns those whose cgroup is not known (yet), and which life of them it is."""
        if not slots:
            return []
        chosen, numbers, unplaced = flows[slots], [], []
        owners = zip(*(chosen[name].tolist() for name in ("cgroup", "cgroup_v1", "process_name")), strict=True)
        for slot, born, owner in zip(slots, chosen["born"].tolist(), owners, strict=True):
            number = self._found_before.get(owner)
            if number is None:
                cgroup, cgroup_v1, name = owner
                place = self._cgroups.place(cgroup, cgroup_v1)
                number = self._number(place or Place(), name.decode("utf-8", "replace"), now_ns)
                if place is None and (cgroup or cgroup_v1):
                    unplaced.append((slot, born))
                else:
                    self._found_before[owner] = number
            self._used_ns[number] = now_ns
            numbers.append(number)
        flows["workload"][slots] = numbers
        return unplaced

    def _number(self, place: Place, program: str, now_ns: int) -> int:
        contained = place.container_id or place.pod_uid
        if not contained and not program:
            return 0
        key = place, "" if contained else program
        number = self._numbers.get(key)
        if number is None:
            workload = self._told(Workload(place, program))
            if self._free:
                number = self._free.pop()
                self._workloads[number] = workload
            else:
                number = len(self._workloads)
                self._workloads.append(workload)
                self._used_ns.append(now_ns)
            self._numbers[key] = number
            if self._pods is not None and place.pod_uid and not workload.told:
                self._unknown[number] = now_ns + self._wait_ns
        return number

    def _told(self, workload: Workload) -> Workload:
        """The same with what is known of its pod."""
        place = workload.place
        if self._pods is None or not place.pod_uid or (pod := self._pods[place.pod_uid]) is None:
            return workload
        return workload._replace(told=tuple(attributes_of(pod, place.container_id).items()))

    def _ask(self, now_ns: int) -> None:
        """Learn what has become known of pods, and stop waiting for those that nobody knows."""
        if self._pods is not None and self._pods.version != self._pods_version:
            self._pods_version = self._pods.version
            for number in self._numbers.values():
                known = self._workloads[number]
                if (told := self._told(known)) != known:
                    self._workloads[number] = told
                    self._unknown.pop(number, None)
        if self._unknown:
            self._unknown = {number: until_ns for number, until_ns in self._unknown.items() if now_ns < until_ns}

    def _tidy(self, flows: Flows, now_ns: int) -> None:
        """Give numbers back that no connection has had for a while."""
        self._tidied_ns = now_ns
        self._found_before.clear()
        for number in np.unique(flows["workload"][flows["born"] != 0]).tolist():
            self._used_ns[number] = now_ns
        for key, number in list(self._numbers.items()):
            if now_ns - self._used_ns[number] >= IDLE_NS:
                del self._numbers[key]
                self._workloads[number] = UNKNOWN
                self._unknown.pop(number, None)
                self._free.append(number)

    def arrange(
        self, flows: Flows, slots: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64] | None, tuple[tuple[int, int], ...]]:
        """Put packets of one workload side by side.

        Args:
            flows: of the connection table (dtype FLOW).
            slots: of each packet (int64, shape (n,)).

        Returns:
            The order (int64, shape (n,)), None where they can stay as they are; and the groups in it, each the number
            of a workload, and one past its last packet.
        """
        if len(self._counts) < len(self._workloads):
            self._counts = np.zeros(2 * len(self._workloads), np.int32)
            self._found = np.empty_like(self._counts)
        if len(self._of) < len(slots):
            self._of = np.empty(2 * len(slots), np.int32)
        order = np.empty(len(slots), np.int64)
        column = flows["workload"]
        many = native.library.tcpio_arrange(
            column, column.strides[0], slots, len(slots), self._of, self._found, self._counts, order
        )
        found = self._found[:many]
        groups = tuple(zip(found.tolist(), self._counts[found].tolist(), strict=True))
        self._counts[found] = 0
        return order if many > 1 else None, groups
