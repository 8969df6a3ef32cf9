"""Which workload each connection belongs to, and packets side by side by that."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.attribution.cgroups import LOOK_NS, Cgroups, Hierarchy
from tcpio_otel.attribution.naming import UNKNOWN, Place, Workload
from tcpio_otel.attribution.pods import Pod, Wanted, pod_of
from tcpio_otel.attribution.workloads import IDLE_NS, PLACING_NS, TIDY_NS, Workloads
from tcpio_otel.batch import FLOW, RECORD, Batch
from tests.unit.attribution.test_attribution_cgroups import ID, OTHER, inode, made


def at(now_ns: int, records: np.ndarray | None = None) -> Batch:
    """A batch of that time."""
    return Batch(np.empty(0, RECORD) if records is None else records, 0, 0, now_ns)


@pytest.fixture
def flows() -> np.ndarray:
    """Eight connections of one program each, in no cgroup."""
    made = np.zeros(8, FLOW)
    made["born"] = np.arange(1, 9)
    made["process_name"] = [f"program{number}" for number in range(8)]
    return made


def test_a_container_is_one_workload_and_so_is_a_program(tmp_path: Path, flows: np.ndarray) -> None:
    """Whatever programs run in a container, and whichever of its cgroups they are in."""
    container, unit = tmp_path / f"docker-{ID}.scope", tmp_path / "nginx.service"
    (container / "below").mkdir(parents=True)
    unit.mkdir()
    flows["cgroup"][:4] = [inode(container), inode(container / "below"), inode(unit), inode(unit)]
    flows["process_name"][4:] = ["curl", "curl", "", "wget"]
    workloads = Workloads(Cgroups({Hierarchy.UNIFIED: tmp_path}, 0))
    workloads.assign(at(0), flows, range(8))
    found = [workloads[number] for number in flows["workload"].tolist()]
    assert found[:2] == [Workload(Place(ID, "docker"), "program0")] * 2
    assert found[2:4] == [Workload(Place(unit="nginx"), "program2"), Workload(Place(unit="nginx"), "program3")]
    assert found[4:] == [Workload(Place(), "curl"), Workload(Place(), "curl"), UNKNOWN, Workload(Place(), "wget")]
    assert flows["workload"][6] == 0
    assert len(workloads) == len(set(flows["workload"].tolist())) == 6


def test_a_cgroup_that_is_not_known_yet_is_looked_for(tmp_path: Path, flows: np.ndarray) -> None:
    """For a while; until then the program is what is known. A slot that is another connection's by then is let be."""
    workloads = Workloads(Cgroups({Hierarchy.UNIFIED: tmp_path}, 0))
    late, never = tmp_path / f"docker-{ID}.scope", 4_000_000_000
    late.mkdir()
    flows["cgroup"][:3] = [inode(late), never, inode(late)]
    workloads.assign(at(1), flows, [0, 1, 2])
    assert [workloads[number].program for number in flows["workload"][:3].tolist()] == [
        "program0", "program1", "program2",
    ]  # fmt: skip
    flows["born"][2], flows["workload"][2] = 99, 0
    workloads.assign(at(LOOK_NS), flows, [])
    assert workloads[int(flows["workload"][0])] == Workload(Place(ID, "docker"), "program0")
    assert workloads[int(flows["workload"][1])] == Workload(Place(), "program1")
    assert flows["workload"][2] == 0
    looks = 0
    for second in range(2, 60):
        before = workloads._cgroups._read_ns
        workloads.assign(at(second * LOOK_NS), flows, [])
        looks += workloads._cgroups._read_ns != before
    assert 0 < looks <= PLACING_NS // LOOK_NS


def test_a_record_of_a_cgroup_counts_for_its_own_batch(tmp_path: Path, flows: np.ndarray) -> None:
    """The container's first packets come right behind it."""
    workloads = Workloads(Cgroups({Hierarchy.UNIFIED: tmp_path}, 0))
    container = tmp_path / f"docker-{OTHER}.scope"
    container.mkdir()
    flows["cgroup"][0] = inode(container)
    workloads.assign(at(1, made(container)), flows, [0])
    assert workloads[int(flows["workload"][0])].place == Place(OTHER, "docker")


def test_numbers_are_used_again_but_not_soon(tmp_path: Path, flows: np.ndarray) -> None:
    """A host on which programs come and go for years stays within bounds; what has a connection keeps its number."""
    workloads, now_ns = Workloads(Cgroups({Hierarchy.UNIFIED: tmp_path}, 0)), 0
    workloads.assign(at(0), flows, [7])
    kept = int(flows["workload"][7])
    most = 0
    for number in range(500):
        now_ns += TIDY_NS // 4
        flows["process_name"][0] = f"job{number}"
        workloads.assign(at(now_ns), flows, [0])
        assert workloads[int(flows["workload"][0])].program == f"job{number}"
        most = max(most, len(workloads))
    assert flows["workload"][7] == kept
    assert workloads[kept].program == "program7"
    assert most <= 4 * (IDLE_NS + 2 * TIDY_NS) // TIDY_NS + 3
    assert len(workloads._workloads) <= most + 1


@given(st.lists(st.integers(0, 5), max_size=200))
def test_packets_of_one_workload_stand_side_by_side(numbers: list[int]) -> None:
    """In the order that they had, and counted; where all are one's, they stay as they are."""
    workloads = Workloads(Cgroups({}, 0))
    flows = np.zeros(8, FLOW)
    flows["born"], flows["process_name"] = 1, [f"program{number}" for number in range(8)]
    workloads.assign(at(0), flows, range(8))
    slots = np.array(numbers, np.int64)
    order, groups = workloads.arrange(flows, slots)
    placed = slots if order is None else slots[order]
    assert sorted(range(len(numbers)) if order is None else order.tolist()) == list(range(len(numbers)))
    start = 0
    for number, end in groups:
        assert {int(flows["workload"][slot]) for slot in placed[start:end]} == {number}
        if order is not None:
            assert (np.diff(order[start:end]) > 0).all()
        start = end
    assert start == len(numbers)
    assert len({number for number, _ in groups}) == len(groups) == len(set(numbers))
    assert (order is None) == (len(groups) < 2)


class Known(dict[str, Pod]):
    """Pods as a test has them."""

    version = 0

    def __missing__(self, uid: str) -> None:
        return None

    def tell(self, uid: str, **labels: str) -> None:
        """Let a pod be known, with labels."""
        metadata = {"uid": uid, "name": "web", "namespace": "shop", "labels": labels}
        self[uid] = pod_of({"metadata": metadata}, Wanted(labels=["tier"]))
        self.version += 1


def test_a_pods_workload_waits_to_be_told_of_and_changes_with_it(tmp_path: Path, flows: np.ndarray) -> None:
    """Until it is known, or nobody waits any more; relabelled, it has another Resource from then on."""
    uid, other = "6d3b2f1e-0a5c-4c1e-9d7f-1234567890ab", "6d3b2f1e-0a5c-4c1e-9d7f-1234567890ff"
    container, unknown = tmp_path / f"pod{uid}" / ID, tmp_path / f"pod{other}"
    container.mkdir(parents=True)
    unknown.mkdir()
    flows["cgroup"][:2] = inode(container), inode(unknown)
    pods = Known()
    workloads = Workloads(Cgroups({Hierarchy.UNIFIED: tmp_path}, 0), pods, wait_ns=10)
    workloads.assign(at(1), flows, range(3))
    first, second, third = flows["workload"][:3].tolist()
    assert [workloads.ready(number) for number in (first, second, third)] == [False, False, True]
    pods.tell(uid, tier="front")
    assert not workloads.ready(first)
    workloads.assign(at(2), flows, [])
    assert [workloads.ready(number) for number in (first, second)] == [True, False]
    assert dict(workloads[first].told)["k8s.pod.label.tier"] == "front"
    before = workloads[first]
    pods.tell(uid, tier="back")
    workloads.assign(at(3), flows, [])
    assert dict(workloads[first].told)["k8s.pod.label.tier"] == "back"
    assert workloads[first] is not before
    workloads.assign(at(11), flows, [])
    assert workloads.ready(second)
    assert workloads[second].told == ()
    assert flows["workload"][:3].tolist() == [first, second, third]
