"""The agent of a GPU host: copies published weights to a local disk and says over HTTP when done.

    POST /pull    {"name": "<run>", "version": 17}    {"state": "pulling", "done": .., "total": ..}
                                                      {"state": "ready", "path": "/.../v000017"}
                                                      {"state": "failed", "reason": "one line"}
    GET  /health  200                                 GET /versions  what is here, bytes used

The pool asks each host's agent before it pauses that host's workers, so that an update reads local
files. It shares SGLang's environment: standard library, fsspec and xxhash (which SGLang brings), no
arrays.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import ssl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from agentcpm_jax.types import UserError
from agentcpm_jax.weights.mirror import Mirror

MAX_BODY = 4096


def open_agent(
    mirror: Mirror, host: str, port: int, key: str = "", certificate: str = ""
) -> ThreadingHTTPServer:
    """A bound server; `serve_forever` runs it.

    Args:
      key: `/pull` and `/versions` want it as bearer; without one only loopback is served.
      certificate: PEM file with private key and chain; empty: no TLS.

    Raises `UserError`: the address or the certificate cannot be used, or there is no key for it.
    """
    if not key and not _is_loopback(host):
        raise UserError(
            f"{host} is open to other machines, which could take copies and crowd out others'; set "
            "SGLANG_ADMIN_API_KEY here and for the trainer, or listen on 127.0.0.1"
        )

    class Handler(_Handler):
        pass

    Handler.mirror, Handler.key = mirror, key
    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --port") from None
    if certificate:
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate)
        except OSError as error:
            server.server_close()
            raise UserError(f"--certificate={certificate}: {error}; name a PEM file") from None
        # The handshake belongs to a connection's own thread: a client that says nothing holds
        # nobody up.
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    return server


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # s that a connection may be idle
    mirror: Mirror
    key: str

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"status": "ok"})
        elif self.path == "/versions" and self._allowed():
            found = {"versions": self.mirror.versions(), "bytes": self.mirror.used()}
            self._answer(200, found | {"source": self.mirror.source})
        elif self.path != "/versions":
            self._answer(404, {"error": f"no route {self.path[:100]}"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            self.close_connection = True  # the body stays unread
            self._answer(400, {"error": f"a body of at most {MAX_BODY} bytes, please"})
            return
        body = self.rfile.read(int(length))
        if self.path != "/pull":
            self._answer(404, {"error": f"no route {self.path[:100]}"})
        elif self._allowed():
            self._pull(body)

    def _pull(self, body: bytes) -> None:
        try:
            asked = json.loads(body)
            name, version = asked["name"], asked["version"]
            if type(name) is not str or type(version) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            self._answer(400, {"error": 'send {"name": "<run>", "version": <number>}'})
            return
        try:
            found = vars(self.mirror.pull(name, version))
            self._answer(200, {key: value for key, value in found.items() if value != ""})
        except UserError as error:
            self._answer(400, {"error": str(error)})

    def _allowed(self) -> bool:
        if "Origin" in self.headers:  # a page in a browser of this machine reaches loopback too
            self._answer(403, {"error": "no web page may ask this"})
            return False
        given = self.headers.get("Authorization", "")
        if not self.key or hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            return True
        self._answer(401, {"error": "the admin key is missing or wrong"})
        return False

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the pool asks often."""
