"""Settings of a rollout pool. Keys are read from the environment and are never stored here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from agentcpm_jax.ranges import check_least, check_seconds
from agentcpm_jax.types import UserError

#: The environment variable that SGLang reads its admin key from.
ADMIN_KEY_ENV = "SGLANG_ADMIN_API_KEY"


@dataclass(frozen=True)
class PoolConfig:
    """Servers that speak SGLang's protocol. Without `urls` the engine in the process is used.

    `pause`, what an update does to running requests:
      abort     they return what they have; the client resends the prefix (every SGLang release);
      retract   the server keeps them and computes their prefix anew under the new weights;
      in_place  the server keeps them and their old keys and values: the fastest, but tokens after
                the switch come from a mixture of two models which no trainer can recompute.
    With `abort` and `retract` every log-probability is that of the version stamped on its token.
    """

    urls: tuple[str, ...] = ()  # one per worker: http://host:30000
    urls_file: str | None = None  # of further urls, one a line; read again at every health check
    router_url: str | None = None  # the official router: requests go there, control to workers
    pause: Literal["abort", "retract", "in_place"] = "abort"
    weights_dir: str | None = None  # a directory or URL (gs://...); None: in the stage's directory
    keep_versions: int = 2  # published ones that stay, the newest included
    agent_port: int | None = None  # of launch/pool_agent.py; None: workers read weights_dir
    api_key_env: str = "SGLANG_API_KEY"  # name of an environment variable, not a key
    max_gap: float = 0.05  # mean |log-prob of server - of trainer| (nats) that a worker may show
    start_timeout: float = 300.0  # s until a worker must be ready
    request_timeout: float = 1800.0  # s for a completion without a deadline, all chunks together
    attempt_timeout: float = 900.0  # s for one HTTP request: what hangs is given up
    control_timeout: float = 60.0  # s for pause, continue, information
    update_timeout: float = 300.0  # s for one worker to load weights
    health_every: float = 10.0  # s between looks at each worker

    def __post_init__(self) -> None:
        times = ("start", "request", "attempt", "control", "update")
        check_seconds(self, "pool", *(f"{name}_timeout" for name in times), "health_every")
        check_least(self, "pool", {"keep_versions": 1, "agent_port": 1, "max_gap": 0})


@dataclass(frozen=True)
class Keys:
    """Two bearer keys; empty = none. Their `repr` shows neither."""

    generate: str = ""
    admin: str = ""

    @classmethod
    def from_environment(cls, cfg: PoolConfig) -> Keys:
        """Read when the pool is made. SGLang takes its ordinary key where it has no admin key."""
        generate = os.environ.get(cfg.api_key_env, "")
        return cls(generate, os.environ.get(ADMIN_KEY_ENV, "") or generate)

    def __repr__(self) -> str:
        return f"Keys(generate={bool(self.generate)}, admin={bool(self.admin)})"


def check_url(url: str) -> str:
    """`url` without a trailing slash.

    Raises `UserError` when it is none, or carries a password (it would end up in logs).
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"pool url {url!r} is no http(s)://host:port; correct pool.urls")
    if parts.username or parts.password:
        shown = f"{parts.scheme}://...@{parts.hostname}"
        raise UserError(f"pool url {shown} carries credentials; use the keys' variables instead")
    return url.rstrip("/")


def agent_url(worker: str, port: int) -> str:
    """The agent of the host that `worker`, a checked url, is on; with TLS where that has it."""
    parts = urlsplit(worker)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{port}"
