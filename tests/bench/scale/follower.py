"""The agent's own client of the API server, by itself: one kind of object of the whole cluster, kept up with.

    python -m tests.bench.scale.follower KUBECONFIG KIND

Says a line with its memory before it has asked, and one when it knows all objects; ends with its input.
"""

import logging
import os
import sys
from pathlib import Path

from tcpio_otel.attribution.cluster import Cluster
from tcpio_otel.attribution.kubernetes import connected
from tcpio_otel.attribution.pods import Wanted
from tests.kernel.harness import resident_bytes

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    client = connected(Path(sys.argv[1]))
    print(resident_bytes(os.getpid()), flush=True)
    with Cluster(client, [sys.argv[2]], Wanted()):
        sys.stdin.read()
