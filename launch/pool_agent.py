"""Copies a run's published weights to this GPU host, once for all of its workers.

    python launch/pool_agent.py --source=gs://bucket/weights --directory=/local/weights
    SGLANG_ADMIN_API_KEY=... python launch/pool_agent.py --source=... --directory=... --host=0.0.0.0

--source is the trainer's pool.weights_dir; pool.agent_port is --port. Runs in SGLang's environment
(no jax). Copies resume where they stopped. Exit codes: 0 stopped, 2 a mistake (one line says it).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.types import UserError
from agentcpm_jax.weights.agent import open_agent
from agentcpm_jax.weights.mirror import Mirror


def main(argv: list[str] | None = None) -> int:
    """Parse, serve until stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="where the trainer publishes")
    parser.add_argument("--directory", required=True, help="on a disk of this host")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=30900)
    parser.add_argument("--quota-gb", type=float, default=0.0, help="0: the disk less 1 GiB")
    parser.add_argument("--certificate", default="", help="PEM with key and chain: serve https")
    args = parser.parse_args(argv)
    try:
        mirror = Mirror(args.source, args.directory, int(args.quota_gb * 1e9))
        key = os.environ.get("SGLANG_ADMIN_API_KEY") or os.environ.get("SGLANG_API_KEY", "")
        server = open_agent(mirror, args.host, args.port, key, args.certificate)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # not from the thread that serves: it would wait
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    host, port = server.server_address[:2]
    print(f"agent of {args.directory} on http://{host}:{port}", flush=True)
    server.serve_forever()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
