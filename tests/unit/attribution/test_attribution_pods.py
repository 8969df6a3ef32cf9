"""Pods as the API server tells of them to attributes."""

from typing import Any

import pytest

from tcpio_otel.attribution.pods import Pod, Wanted, attributes_of, pod_of

ID, BEFORE = "0123456789abcdef" * 4, "fedcba9876543210" * 4


def item(**metadata: Any) -> dict[str, Any]:
    """A running pod with one container, started once again."""
    return {
        "metadata": {"uid": "some-uid", "name": "web-7d9f", "namespace": "shop", **metadata},
        "spec": {"nodeName": "node-7"},
        "status": {
            "startTime": "2026-11-26T01:02:03Z",
            "containerStatuses": [
                {
                    "name": "main",
                    "restartCount": 1,
                    "image": "registry.example:5000/shop/web:1.4@sha256:abc",
                    "containerID": f"containerd://{ID}",
                    "lastState": {"terminated": {"containerID": f"containerd://{BEFORE}"}},
                }
            ],
        },
    }


def owner(kind: str, name: str) -> list[dict[str, Any]]:
    """Who made a pod; somebody else only looks at it."""
    return [{"kind": "Node", "name": "other"}, {"kind": kind, "name": name, "controller": True}]


def test_a_pod_and_its_container_are_named() -> None:
    """By the names of the semantic conventions; what was started again is known by its old id too."""
    pod = pod_of(item(), Wanted())
    expected = {
        "k8s.pod.uid": "some-uid",
        "k8s.pod.name": "web-7d9f",
        "k8s.pod.start_time": "2026-11-26T01:02:03Z",
        "k8s.namespace.name": "shop",
        "k8s.node.name": "node-7",
        "k8s.container.name": "main",
        "k8s.container.restart_count": "1",
        "container.image.name": "registry.example:5000/shop/web",
        "service.name": "web-7d9f",
        "service.namespace": "shop",
        "service.version": "1.4@sha256:abc",
        "service.instance.id": "shop.web-7d9f.main",
    }
    assert attributes_of(pod, ID) == attributes_of(pod, BEFORE) == expected
    unknown = attributes_of(pod, "f" * 64)
    assert "k8s.container.name" not in unknown
    assert unknown["service.instance.id"] == "shop.web-7d9f"


@pytest.mark.parametrize(
    ("kind", "name", "labels", "owners", "service"),
    [
        (
            "ReplicaSet",
            "web-5c6f",
            {"pod-template-hash": "5c6f"},
            {"k8s.replicaset.name": "web-5c6f", "k8s.deployment.name": "web"},
            "web",
        ),
        ("ReplicaSet", "alone", {"pod-template-hash": "5c6f"}, {"k8s.replicaset.name": "alone"}, "alone"),
        ("ReplicaSet", "web-5c6f", {}, {"k8s.replicaset.name": "web-5c6f"}, "web-5c6f"),
        ("StatefulSet", "db", {}, {"k8s.statefulset.name": "db"}, "db"),
        ("DaemonSet", "agent", {}, {"k8s.daemonset.name": "agent"}, "agent"),
        ("Job", "backup-29400123", {}, {"k8s.job.name": "backup-29400123", "k8s.cronjob.name": "backup"}, "backup"),
        ("Job", "once-42", {}, {"k8s.job.name": "once-42"}, "once-42"),
        ("Rollout", "canary", {}, {}, "web-7d9f"),
    ],
)
def test_owners_are_told_up_to_the_one_that_people_know(
    kind: str, name: str, labels: dict[str, str], owners: dict[str, str], service: str
) -> None:
    """A Deployment by its template's hash, a CronJob by the time in its job's name; the service is named so too."""
    found = attributes_of(pod_of(item(ownerReferences=owner(kind, name), labels=labels), Wanted()), ID)
    kinds = ("deployment", "replicaset", "statefulset", "daemonset", "job", "cronjob")
    assert {key: value for key, value in found.items() if key.split(".")[1] in kinds} == owners
    assert found["service.name"] == service


def test_what_a_pod_says_of_itself_counts_most() -> None:
    """Annotations first, then the labels that were asked for, then owners."""
    labels = {"app.kubernetes.io/name": "store", "app.kubernetes.io/version": "2", "team": "x"}
    annotations = {
        "resource.opentelemetry.io/service.name": "checkout",
        "resource.opentelemetry.io/deployment.environment.name": "staging",
        "note": "y",
    }
    quiet = pod_of(item(labels=labels), Wanted())
    assert attributes_of(quiet, ID)["service.name"] == "web-7d9f"
    labelled = pod_of(item(labels=labels), Wanted(labels=["team", "absent"], service_labels=True))
    found = attributes_of(labelled, ID)
    assert (found["service.name"], found["service.version"], found["k8s.pod.label.team"]) == ("store", "2", "x")
    assert "k8s.pod.label.absent" not in found
    instance = pod_of(item(labels={**labels, "app.kubernetes.io/instance": "store-eu"}), Wanted(service_labels=True))
    assert attributes_of(instance, ID)["service.name"] == "store-eu"
    told = pod_of(item(labels=labels, annotations=annotations), Wanted(annotations=["note"], service_labels=True))
    found = attributes_of(told, ID)
    assert (found["service.name"], found["deployment.environment.name"]) == ("checkout", "staging")
    assert found["k8s.pod.annotation.note"] == "y"


def test_a_static_pod_has_two_uids() -> None:
    """Its cgroups bear the one that the kubelet made of its file."""
    pod = pod_of(item(annotations={"kubernetes.io/config.hash": "a" * 32}), Wanted())
    assert pod.uids == ("some-uid", "a" * 32)
    assert attributes_of(pod, ID)["k8s.pod.uid"] == "some-uid"


def test_a_pod_that_has_only_been_made_is_one() -> None:
    """Nothing but what every pod has."""
    pod = pod_of({"metadata": {"uid": "u", "name": "n", "namespace": "s"}, "spec": {}}, Wanted())
    assert isinstance(pod, Pod)
    assert attributes_of(pod, ID)["service.name"] == "n"
