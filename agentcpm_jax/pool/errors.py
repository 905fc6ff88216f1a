"""What can go wrong with a server: one exception, a kind for each way, one clean line."""

from __future__ import annotations

import enum
import reprlib
from typing import Any


class PoolErrorKind(enum.StrEnum):
    """Why an attempt failed; the name in metrics and messages."""

    UNREACHABLE = "unreachable"  # no connection, or it broke
    TIMEOUT = "timeout"
    BUSY = "busy"  # 408, 429, 503
    SERVER_ERROR = "server_error"
    BAD_ANSWER = "bad_answer"  # not JSON, wrong types, another request's, figures that disagree
    BAD_REQUEST = "bad_request"  # the server will never answer this
    FORBIDDEN = "forbidden"  # 401, 403
    WRONG_VERSION = "wrong_version"
    VOCABULARY = "vocabulary"  # an id that the trainer does not have
    NON_FINITE = "non_finite_logprob"
    UPDATE_REFUSED = "update_refused"  # `success: false`
    DIED_LOADING = "died_loading"  # the connection broke while it loaded weights
    NO_WEIGHTS = "no_weights"  # the host's agent could not copy them


#: What a server says of a request rather than of itself: said twice in a row it is believed.
OF_THE_REQUEST = frozenset({PoolErrorKind.BAD_REQUEST, PoolErrorKind.FORBIDDEN})


#: Errors after which a worker is checked again, its version too, before it gets another request.
SUSPECT = frozenset(
    {
        PoolErrorKind.UNREACHABLE,
        PoolErrorKind.TIMEOUT,
        PoolErrorKind.WRONG_VERSION,
        PoolErrorKind.FORBIDDEN,
    }
)
#: Errors after which nothing more is to be expected of a worker's running requests.
GONE = frozenset({PoolErrorKind.UNREACHABLE, PoolErrorKind.TIMEOUT, PoolErrorKind.DIED_LOADING})


class PoolError(Exception):
    """A named failure of one attempt. `str` is one line: kind, server, what it said.

    `final`: found before anything was sent, so that no server can help.
    """

    def __init__(self, kind: PoolErrorKind, url: str, detail: str, *, final: bool = False) -> None:
        self.kind, self.url, self.detail, self.final = kind, url, one_line(detail, 400), final
        super().__init__(f"{kind}: {url}: {self.detail}")


def shown(value: Any) -> str:
    """What a server sent, for a message: however long or deep it is, a short line."""
    return one_line(value if isinstance(value, str) else reprlib.repr(value), 200)


def one_line(text: str, most: int) -> str:
    """`text` without what does not belong into a log or a terminal: breaks, escapes, surrogates."""
    printable = "".join(c if c.isprintable() else " " for c in text[: 4 * most])
    return " ".join(printable.split())[:most]
