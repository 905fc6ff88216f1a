"""An object store on a real port and its fsspec protocol: no rename, whole objects or none.

emu://127.0.0.1:PORT/bucket/key        after `register()`
"""

from __future__ import annotations

import io
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import fsspec
import httpx


class ObjectStore:
    """Objects in memory. `broken`: so many answers end in the middle; `gate`: reads wait for it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.served: Counter[str] = Counter()  # bytes of each key that readers got
        self.broken = 0
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()  # a reader stands at the gate

        class Handler(_Handler):
            store = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"emu://127.0.0.1:{self._server.server_address[1]}/bucket"

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStore

    def do_GET(self) -> None:
        key = unquote(self.path[1:])
        if key.endswith("?list"):
            prefix = key.removesuffix("?list")
            names = sorted(k for k in self.store.objects if k.startswith(prefix))
            self._answer(
                200, "\n".join(f"{len(self.store.objects[k])} {k}" for k in names).encode()
            )
            return
        if key not in self.store.objects:
            self._answer(404, b"")
            return
        content = self.store.objects[key]
        first, last = self.headers.get("Range", f"bytes=0-{len(content)}")[6:].split("-")
        content = content[int(first) : int(last) + 1]
        if int(first) > 0 and not self.store.gate.is_set():
            self.store.waiting.set()
            self.store.gate.wait()
        if self.store.broken > 0:
            self.store.broken -= 1
            self.send_response(206)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.store.served[key] += len(content)
        self._answer(206, content)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.store.objects[unquote(self.path[1:])] = body
        self._answer(200, b"")

    def do_DELETE(self) -> None:
        found = self.store.objects.pop(unquote(self.path[1:]), None)
        self._answer(404 if found is None else 200, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class EmulatedFileSystem(fsspec.AbstractFileSystem):
    """What a cloud's fsspec package does: every call is a request."""

    protocol = "emu"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return path.removeprefix("emu://").rstrip("/") if isinstance(path, str) else path

    def ls(self, path: str, detail: bool = True, **_options: Any) -> Any:
        path = self._strip_protocol(path)
        host, _, prefix = path.partition("/")
        lines = self._call("GET", f"{host}/{prefix}?list").text.split("\n")
        found: dict[str, dict[str, Any]] = {}
        for size, key in (line.split(" ", 1) for line in lines if line):
            rest = key.removeprefix(prefix)
            if rest == "":
                return [{"name": path, "size": int(size), "type": "file"}] if detail else [path]
            if not rest.startswith("/"):
                continue
            child, deeper, _ = rest[1:].partition("/")
            kind = "directory" if deeper else "file"
            found[child] = {"name": f"{path}/{child}", "size": int(size), "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else [f["name"] for f in found.values()]

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        headers = {} if end is None else {"Range": f"bytes={start or 0}-{end - 1}"}
        return self._call("GET", self._strip_protocol(path), headers=headers).content

    def rm_file(self, path: str) -> None:
        self._call("DELETE", self._strip_protocol(path))

    def rm(self, path: str, recursive: bool = False, maxdepth: Any = None) -> None:
        for name in self.find(path):
            self.rm_file(name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        assert mode == "wb"
        return _Upload(self, self._strip_protocol(path))

    def _call(self, method: str, where: str, **options: Any) -> httpx.Response:
        answer = httpx.request(method, f"http://{where}", trust_env=False, timeout=60, **options)
        if answer.status_code == 404:
            raise FileNotFoundError(where)
        return answer.raise_for_status()


class _Upload(io.BytesIO):
    """The object exists when it is closed."""

    def __init__(self, fs: EmulatedFileSystem, path: str) -> None:
        super().__init__()
        self._fs, self._path = fs, path

    def close(self) -> None:
        if not self.closed:
            self._fs._call("PUT", self._path, content=self.getvalue())
        super().close()


def register() -> None:
    """Makes emu:// known to fsspec in this process."""
    fsspec.register_implementation("emu", EmulatedFileSystem, clobber=True)
