"""Measures what docs/scale.md is worked out from, with real parts.

    python -m tests.bench.scale                 all of it, in some forty minutes; needs root
    python -m tests.bench.scale server node     parts of it
    python -m tests.bench.scale --quick         little of everything, to see that it runs

CPU time is that of the processes in question, so that a busy neighbour counts less; medians of a few rounds.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.scale import gateway, node, server, usage
from tests.peers import clickhouse, collector_contrib, kubernetes

COUNTS = server.Counts(pods=5000, nodes=500, slices=50, services=500, watches=400, changes=200, rounds=3)
FEW = server.Counts(pods=60, nodes=4, slices=2, services=4, watches=2, changes=4, rounds=1)


def of_server(directory: Path, *, quick: bool) -> Iterator[str]:
    """The API server and its watches."""
    counts = FEW if quick else COUNTS
    (directory / "cluster").mkdir()
    with kubernetes.control_plane(directory / "cluster", *server.FLAGS) as cluster:
        yield from server.report(cluster, counts, directory)


def of_node(directory: Path, *, quick: bool) -> Iterator[str]:
    """The agent on a node."""
    with node.node(directory) as here:
        if quick:
            yield from node.report(here, [50], 1, 1, [node.SPANS])
        else:
            yield from node.report(here, [170, 1700, 8000], 10, 2, node.MODES.keys() - {node.DEFAULT})


def of_gateway(directory: Path, *, quick: bool) -> Iterator[str]:
    """The Collector behind agents, and the store behind it."""
    rate, of_short, seconds = (50, 20, 1) if quick else (2000, 600, 15)
    with node.node(directory) as here:
        sent: gateway.Sent = {}
        for mode in (node.DEFAULT, node.BARE, node.BY_PODS):
            sent[mode] = {"logs": here.run(node.MODES[mode], rate, seconds).requests["logs"]}
        short = here.run(node.MODES[node.DEFAULT], of_short, seconds, node.SHORT)
    sent[node.DEFAULT]["traces"] = short.requests["traces"]
    yield from gateway.stored(directory, sent)
    yield from gateway.passed_on(directory, sent[node.DEFAULT], 1 if quick else 3)


PARTS = {"server": of_server, "node": of_node, "gateway": of_gateway}


def main() -> int:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="little of everything, once")
    given = parser.parse_args()
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    try:
        for build in (kubernetes.build, collector_contrib.build, clickhouse.build):
            build()
    except LookupError as reason:
        print(f"cannot measure: {reason}", file=sys.stderr)
        return 3
    if given.quick:
        usage.patience_s = 2
    for name in given.parts or PARTS:
        with tempfile.TemporaryDirectory() as directory:
            for line in PARTS[name](Path(directory), quick=given.quick):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
