"""Programs without a network, and a note of every attempt of theirs to use one.

    notes, answer = unplugged(serve_and_ask, folder)

The function runs in a child of its own. There, and in every Python program below it, an audit hook
notes names that are looked up and addresses that are connected to, loopback excepted. Where the
machine permits it the child also leaves the network: only loopback is left, and the kernel's count
of packets without a route notes what libraries in C try (`fenced`: it was permitted).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEW_USER, NEW_NET = 0x10000000, 0x40000000  # linux/sched.h
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h

#: `sitecustomize` of every Python program that runs there.
HOOK = """
import os, sys
notes = os.open(os.environ["EGRESS_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def own(host):
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    return name in (None, "", "localhost", "::1") or str(name).startswith("127.")
def hook(event, args):
    host = None
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None  # else a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    elif event in ("socket.gethostbyaddr", "socket.getnameinfo"):
        host = f"name of {args[0]}"  # asks a name server, also about loopback
    if not own(host):
        os.write(notes, f"{event} {host!r} by {' '.join(sys.argv)[:200]}\\n".encode())
sys.addaudithook(hook)
"""


def unplugged(function: Callable[[Path], Any], folder: Path) -> tuple[list[str], Any]:
    """(notes, what the module-level function returned, as JSON) of `function(folder)`."""
    hook, notes, result = (folder / name for name in ("hook", "notes", "result"))
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    left_out = ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "all_proxy", "no_proxy")
    kept = {k: v for k, v in os.environ.items() if k not in left_out and k.lower() not in left_out}
    paths = os.pathsep.join(map(str, (hook, ROOT, ROOT / "launch")))
    environment = kept | {"PYTHONPATH": paths, "EGRESS_NOTES": str(notes)}
    place = [function.__module__, function.__name__, str(folder), str(result)]
    command = [sys.executable, "-m", "tests.doubles.unplugged", *place]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return notes.read_text().splitlines(), json.loads(result.read_text())


@contextlib.contextmanager
def running(script: str, *arguments: str, **environment: str) -> Iterator[str]:
    """A launcher that serves; its url. Ended by SIGTERM, after which it must exit with 0."""
    command = [sys.executable, str(ROOT / "launch" / script), *arguments]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    assert server.stdout is not None
    try:
        yield server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        code = server.wait(60)
        server.stdout.close()
    assert code == 0, f"{script} exited with {code}"


def fenced() -> bool:
    """Leave the network, if that is permitted; of it only loopback is then left."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_NET) != 0:
        if libc.unshare(NEW_USER | NEW_NET) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket() as any_socket:
        asked = struct.pack("16sh22x", b"lo", 0)
        (flags,) = struct.unpack("16xh22x", fcntl.ioctl(any_socket, GET_FLAGS, asked))
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh22x", b"lo", flags | UP))
    return True


def without_route() -> int:
    """Packets that this network could not send, of both versions of IP."""
    four = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in four if line.startswith("Ip:"))
    count = int(dict(zip(names, values, strict=True))["OutNoRoutes"])
    six = Path("/proc/net/snmp6")
    lines = six.read_text().splitlines() if six.exists() else []
    return count + sum(int(line.split()[1]) for line in lines if line.startswith("Ip6OutNoRoutes"))


def main(module: str, name: str, folder: str, result: str) -> None:
    is_fenced = fenced()
    answer = getattr(importlib.import_module(module), name)(Path(folder))
    Path(result).write_text(json.dumps(answer))
    if is_fenced and (lost := without_route()):
        with Path(os.environ["EGRESS_NOTES"]).open("a") as notes:
            notes.write(f"{lost} packets had no route\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
