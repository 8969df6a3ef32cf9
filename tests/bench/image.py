"""What the container images weigh, as a registry keeps them, and how long the chart's pod takes to start with each.

    python -m tests.bench.image

As root, with buildah and debootstrap. A layer is counted as gzip makes it and as a node unpacks it; the base is a
minimal Debian of one layer. Times are from the start of the container's process, the making of its mounts included,
with the files of the image in memory: until it says that it records, and until the first packet of a busy host that it
recorded.
"""

import gzip
import json
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.peers import helm as peer
from tests.peers import image as images
from tests.peers.image import Image
from tests.peers.pod import CONFIGURATION, NODE, render, started, talk, wait_for

ROUNDS = 9


def layers(name: str) -> list[tuple[int, int]]:
    """Bytes of each layer, base first: as a registry has it, and unpacked."""
    with tempfile.TemporaryDirectory() as directory:
        blobs = Path(directory, "blobs", "sha256")
        images.buildah("push", "--compression-format=gzip", name, f"oci:{directory}")
        (described,) = json.loads(Path(directory, "index.json").read_text())["manifests"]
        manifest = json.loads((blobs / described["digest"].removeprefix("sha256:")).read_text())
        found = [blobs / layer["digest"].removeprefix("sha256:") for layer in manifest["layers"]]
        return [(path.stat().st_size, unpacked(path)) for path in found]


def unpacked(path: Path) -> int:
    """Bytes of a file once gzip has unpacked it."""
    with gzip.open(path) as file:
        return sum(map(len, iter(lambda: file.read(1 << 20), b"")))


@contextmanager
def busy() -> Iterator[None]:
    """A connection over loopback every few milliseconds."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.002):
            talk()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def starts(image: Image, helm: Mapping[str, str], loader: str) -> tuple[float, float]:
    """Seconds until the agent says that it records, and until the first packet that it recorded."""
    pod, files = render(helm, f"config.capture.loader={loader}")
    with tempfile.TemporaryDirectory() as directory, busy():
        began_ns = time.time_ns()
        with started(pod, files, NODE, Path(directory), ["run", "-c", CONFIGURATION], image=image) as process:
            wait_for(process, "recording to")
            said_ns = time.time_ns()
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        first_ns = min(
            int(record["timeUnixNano"])
            for line in Path(directory, "files", "logs.jsonl").read_text().splitlines()
            for resource in json.loads(line)["resourceLogs"]
            for scope in resource["scopeLogs"]
            for record in scope["logRecords"]
        )
    return (said_ns - began_ns) / 1e9, (first_ns - began_ns) / 1e9


def main() -> None:
    """Build, measure, and print a table."""
    with tempfile.TemporaryDirectory() as directory:
        helm = peer.environment(Path(directory))
        print(f"{'target':10}{'MB unpacked':>14}{'MB by gzip':>12}{'base: MB':>12}{'by gzip':>9}", end="")
        print(f"{'s to start':>13}{'to a packet':>13}")
        for target in ("libbpf", "bcc"):
            name = images.build(target)
            base, *own = layers(name)
            with images.mounted(name) as image:
                taken = [starts(image, helm, target) for _ in range(ROUNDS + 1)][1:]  # the first reads its files
            said, packet = (statistics.median(times) for times in zip(*taken, strict=True))
            compressed, whole = (sum(sizes) / 1e6 for sizes in zip(*own, strict=True))
            print(f"{target:10}{whole:14.0f}{compressed:12.0f}{base[1] / 1e6:12.0f}{base[0] / 1e6:9.0f}", end="")
            print(f"{said:13.2f}{packet:13.2f}")


if __name__ == "__main__":
    main()
