"""Many watches from one process, as so many agents would hold them; what comes is counted and not looked at.

    python -m tests.bench.scale.streams PORT CA TOKEN < paths

Says a line when all are open, and one with the counts for each line of input after that.
"""

import asyncio
import json
import ssl
import sys
from dataclasses import asdict, dataclass

CHANGED = b'{"type":"MODIFIED"'


@dataclass
class Counts:
    """Of all watches together."""

    open: int = 0
    events: int = 0
    bytes: int = 0


async def _watch(path: str, port: int, token: str, context: ssl.SSLContext, counts: Counts) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=1 << 20)
    head = (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\nAuthorization: Bearer {token}\r\n\r\n"
    )
    writer.write(head.encode())
    answer = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in answer.splitlines()[0], answer
    counts.open += 1
    rest = b""
    while data := await reader.read(1 << 18):
        counts.bytes += len(data)
        counts.events += (rest + data).count(CHANGED)
        rest = data[1 - len(CHANGED) :]


async def _main(port: int, authority: str, token: str) -> None:
    loop, counts = asyncio.get_running_loop(), Counts()
    context = ssl.create_default_context(cafile=authority)
    paths = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    watches = [asyncio.create_task(_watch(path, port, token, context, counts)) for path in paths]
    while counts.open < len(paths):
        await asyncio.sleep(0.05)
        for watch in watches:
            if watch.done():
                watch.result()  # it may have failed
    print("open", flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(asdict(counts)), flush=True)
    for watch in watches:
        watch.cancel()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), *sys.argv[2:]))
