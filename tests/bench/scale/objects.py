"""Objects as a cluster in use has them, by number: what controllers and kubelets would write."""

import hashlib
import uuid
from typing import Any

PORT = 8080
PODS_ON_NODE = 30
ENDPOINTS_IN_SLICE = 100  # as many as the controller puts into one
IMAGES_ON_NODE = 50  # as many as a kubelet lists
CORE = "/api/v1/namespaces/default"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"

Object = dict[str, Any]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def address(pod: int) -> str:
    """Of a pod."""
    return f"10.{64 + (pod >> 16)}.{pod >> 8 & 255}.{pod & 255}"


def node_of(pod: int) -> int:
    """Where a pod is."""
    return pod // PODS_ON_NODE


def name_of(pod: int) -> str:
    """A Deployment's."""
    return f"shop-{pod // ENDPOINTS_IN_SLICE}-7c9d8b6f5-{_hash(str(pod))[:5]}"


def container_id(pod: int) -> str:
    """Of its first container."""
    return _hash(f"container {pod}")


def _time(second: int) -> str:
    return f"2026-11-26T{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}Z"


def _container(name: str) -> Object:
    image = f"registry.example.com/shop/{name}:v1.{len(name)}.3"
    probe = {"httpGet": {"path": "/healthz", "port": PORT}, "periodSeconds": 10, "timeoutSeconds": 2}
    settings = ("LOG_LEVEL", "DATABASE_HOST", "DATABASE_NAME", "CACHE_HOST", "QUEUE_URL", "REGION", "FEATURES", "ZONE")
    return {
        "name": name, "image": image, "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "env": [{"name": key, "value": f"{key.lower()}.shop.svc.cluster.local"} for key in settings]
        + [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "livenessProbe": probe, "readinessProbe": probe,
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/shop", "readOnly": True},
            {"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True},
        ],
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "allowPrivilegeEscalation": False},
    }  # fmt: skip


def pod(number: int) -> Object:
    """Two containers, probes, variables, a token."""
    application = f"shop-{number // ENDPOINTS_IN_SLICE}"
    owner = f"{application}-7c9d8b6f5"
    labels = {f"app.kubernetes.io/{key}": application for key in ("name", "instance", "part-of")}
    token = {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}}
    root = {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}}
    return {
        "metadata": {
            "name": name_of(number), "labels": {**labels, "pod-template-hash": "7c9d8b6f5"},
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORT)},
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": str(uuid.uuid4()),
                "controller": True, "blockOwnerDeletion": True,
            }],
        },
        "spec": {
            "nodeName": f"node-{node_of(number)}", "serviceAccountName": "default",
            "containers": [_container(name) for name in ("server", "proxy")],
            "volumes": [
                {"name": "config", "configMap": {"name": f"{application}-config"}},
                {"name": "token", "projected": {"sources": [token, root]}},
            ],
            "tolerations": [
                {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute",
                 "tolerationSeconds": 300} for key in ("not-ready", "unreachable")
            ],
        },
    }  # fmt: skip


def pod_status(number: int, second: int = 0) -> Object:
    """As a kubelet says it."""
    conditions = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
    containers = [
        {
            "name": name, "containerID": f"containerd://{container_id(number) if at == 0 else _hash(name)}",
            "image": f"registry.example.com/shop/{name}:v1.{len(name)}.3",
            "imageID": f"registry.example.com/shop/{name}@sha256:{_hash(name)}",
            "ready": True, "started": True, "restartCount": 0, "state": {"running": {"startedAt": _time(0)}},
        }
        for at, name in enumerate(("server", "proxy"))
    ]  # fmt: skip
    node = node_of(number)
    host = f"10.0.{node >> 8}.{node & 255}"
    return {
        "phase": "Running", "hostIP": host, "hostIPs": [{"ip": host}], "startTime": _time(0), "qosClass": "Burstable",
        "podIP": address(number), "podIPs": [{"ip": address(number)}], "containerStatuses": containers,
        "conditions": [{"type": each, "status": "True", "lastTransitionTime": _time(second)} for each in conditions],
    }  # fmt: skip


def node(number: int) -> Object:
    """With the labels that a cloud gives it."""
    labels = {
        "kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "kubernetes.io/hostname": f"node-{number}",
        "node.kubernetes.io/instance-type": "m5.4xlarge", "topology.kubernetes.io/region": "region-1",
        "topology.kubernetes.io/zone": f"region-1{'abc'[number % 3]}", "node.kubernetes.io/nodegroup": "general",
    }  # fmt: skip
    annotations = {
        "node.alpha.kubernetes.io/ttl": "0",
        "csi.volume.kubernetes.io/nodeid": f'{{"csi":"i-{number:017x}"}}',
    }
    spec = {"podCIDR": f"10.64.{number & 255}.0/24", "providerID": f"cloud:///region-1a/i-{number:017x}"}
    return {"metadata": {"name": f"node-{number}", "labels": labels, "annotations": annotations}, "spec": spec}


def node_status(number: int, second: int = 0) -> Object:
    """As a kubelet says it, at least every five minutes."""
    amounts = {"cpu": "16", "memory": "64946812Ki", "pods": "110", "ephemeral-storage": "101430960Ki"}
    reasons = {
        "MemoryPressure": "KubeletHasSufficientMemory", "DiskPressure": "KubeletHasNoDiskPressure",
        "PIDPressure": "KubeletHasSufficientPID", "Ready": "KubeletReady",
    }  # fmt: skip
    images = [f"registry.example.com/team-{at % 7}/service-{at}" for at in range(IMAGES_ON_NODE)]
    return {
        "capacity": amounts, "allocatable": amounts,
        "addresses": [
            {"type": "InternalIP", "address": f"10.0.{number >> 8}.{number & 255}"},
            {"type": "Hostname", "address": f"node-{number}"},
        ],
        "conditions": [
            {"type": name, "status": str(name == "Ready"), "reason": reason, "message": f"kubelet says {reason}",
             "lastHeartbeatTime": _time(second), "lastTransitionTime": _time(0)}
            for name, reason in reasons.items()
        ],
        "nodeInfo": {
            "machineID": _hash("m")[:32], "systemUUID": str(uuid.UUID(int=number)),
            "bootID": str(uuid.UUID(int=number)),
            "kernelVersion": "6.12.48", "osImage": "Debian GNU/Linux 13 (trixie)", "architecture": "amd64",
            "containerRuntimeVersion": "containerd://2.1.4", "kubeletVersion": "v1.37.2", "kubeProxyVersion": "",
            "operatingSystem": "linux",
        },
        "images": [
            {"names": [f"{image}@sha256:{_hash(image)}", f"{image}:v1.2.3"], "sizeBytes": 123456789}
            for image in images
        ],
    }  # fmt: skip


def endpoint_slice(number: int, flipped: int | None = None) -> Object:
    """A hundred pods behind a Service; one of them may not be ready."""
    pods = range(number * ENDPOINTS_IN_SLICE, (number + 1) * ENDPOINTS_IN_SLICE)
    return {
        "metadata": {
            "name": f"shop-{number}-{_hash(str(number))[:5]}",
            "labels": {
                "kubernetes.io/service-name": f"shop-{number}",
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
        },
        "addressType": "IPv4", "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
        "endpoints": [
            {
                "addresses": [address(pod)], "nodeName": f"node-{node_of(pod)}", "zone": "region-1a",
                "conditions": dict.fromkeys(("ready", "serving"), pod != flipped) | {"terminating": False},
                "targetRef": {
                    "kind": "Pod", "name": name_of(pod), "namespace": "default", "uid": str(uuid.UUID(int=1 + pod)),
                },
            }
            for pod in pods
        ],
    }  # fmt: skip


def service(number: int) -> Object:
    """Of one port."""
    name = f"shop-{number}"
    labels = {f"app.kubernetes.io/{key}": name for key in ("name", "instance", "part-of")}
    ports = [{"name": "http", "port": 80, "targetPort": PORT, "protocol": "TCP"}]
    return {"metadata": {"name": name, "labels": labels}, "spec": {"selector": labels, "ports": ports}}
