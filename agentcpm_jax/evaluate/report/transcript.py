"""A trajectory as HTML: who said what, what was thought, which tool was called with what.

Everything is escaped; text keeps its direction to itself and its control characters are shown.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence

from agentcpm_jax.evaluate.report.formats import format_number

LONG, TALL = 700, 14  # characters and lines of an observation that are shown before a fold
PARTS = re.compile(r"<(think|tool_call|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)
RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
# control characters, and those that reorder the text around them
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
MARKS = {"right": "✓", "wrong": "✗"}


def transcript(
    title: str,
    verdict: str,
    reward: float | None,
    turns: Sequence[tuple[str, str]],
    note: str = "",
    opened: bool = False,
) -> str:
    """One foldable trajectory; `turns` are (role, text), texts as rendered with Qwen's tags."""
    calls = sum(text.count("<tool_call>") for role, text in turns if role == "assistant")
    size = f"{len(turns)} turns, {calls} tool call{'' if calls == 1 else 's'}"
    score = "" if reward is None else f", reward {format_number(reward)}"
    known = verdict if verdict in MARKS else "unknown"
    about = f'<p class="about">{escape(note)}</p>' if note else ""
    return (
        f'<details class="trajectory"{" open" if opened else ""}><summary>'
        f'<span class="verdict {known}">{MARKS.get(verdict, "?")} {escape(verdict)}</span> '
        f'<span class="task">{escape(title)}</span> '
        f'<span class="size">{escape(size + score)}</span></summary>{about}'
        f"{''.join(_turn(role, text) for role, text in turns)}</details>"
    )


def escape(text: str) -> str:
    """HTML-escaped, quotes too, with control characters made visible."""
    return html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _turn(role: str, text: str) -> str:
    if role == "user" and RESPONSE.fullmatch(text):
        role = "tool"  # Qwen's template shows observations as the user's words
    kind = role if role in ("system", "user", "assistant", "tool") else "other"
    if role == "assistant":
        body = _assistant(text)
    elif role == "tool":
        parts = RESPONSE.findall(text) or [text]
        body = "".join(_folded(part, "observation") for part in parts)
    elif role == "system":
        first, _, rest = text.strip().partition("\n")
        hidden = f"<details><summary>{escape(first[:160])}</summary>{_words(text)}</details>"
        body = hidden if rest or len(first) > 160 else _words(text)
    else:
        body = _words(text)
    return f'<div class="turn {kind}"><p class="role">{escape(role)}</p><div>{body}</div></div>'


def _assistant(text: str) -> str:
    """Plain words, thoughts, calls and the answer, in the order in which they were said."""
    out, at = [], 0
    for match in PARTS.finditer(text):
        out.append(_words(text[at : match.start()]))
        tag, inner = match.group(1), match.group(2).strip()
        if tag == "think" and inner:
            out.append(f'<div class="think" dir="auto">{escape(inner)}</div>')
        elif tag == "tool_call":
            out.append(_call(inner))
        elif tag == "answer":
            out.append(f'<p class="answer" dir="auto"><b>answer</b> {escape(inner)}</p>')
        at = match.end()
    out.append(_words(text[at:]))
    return "".join(out) or '<p class="empty">(nothing)</p>'


def _call(text: str) -> str:
    """`name(key = value, …)`; a call that does not parse is shown as it was written."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call["arguments"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f'<pre class="call broken" dir="auto"><b>malformed call</b> {escape(text)}</pre>'
    shown = ", ".join(
        f"<i>{escape(str(k))}</i> = {escape(json.dumps(v, ensure_ascii=False))}"
        for k, v in arguments
    )
    return f'<pre class="call" dir="auto"><b>{escape(str(name))}</b>({shown})</pre>'


def _folded(text: str, kind: str) -> str:
    lines = text.splitlines(keepends=True)
    if len(text) <= LONG + 200 and len(lines) <= TALL + 4:
        return f'<pre class="{kind}" dir="auto">{escape(text)}</pre>'
    cut = min(len("".join(lines[:TALL])), LONG)
    cut = text.rfind("\n", cut - 200, cut) + 1 or cut
    return (
        f'<pre class="{kind}" dir="auto">{escape(text[:cut].rstrip())}\n…</pre><details><summary>'
        f"{len(text) - cut:,} more characters</summary>"
        f'<pre class="{kind}" dir="auto">{escape(text[cut:])}</pre></details>'
    )


def _words(text: str) -> str:
    text = text.strip()
    return f'<p class="words" dir="auto">{escape(text)}</p>' if text else ""


STYLE = """
.trajectory{border:1px solid var(--line);border-radius:6px;margin:0 0 .7rem;background:#fff}
.trajectory>summary{padding:.55rem .9rem;background:var(--soft);border-radius:6px;
font-size:14px}
.trajectory[open]>summary{border-bottom:1px solid var(--line);border-radius:6px 6px 0 0}
.verdict{display:inline-block;min-width:5.9rem;font-weight:650}
.verdict.right{color:#00704f}.verdict.wrong{color:#a8410a}.verdict.unknown{color:var(--muted)}
.task{font-weight:600;unicode-bidi:isolate}
.size{color:var(--muted);font-size:13px;margin-left:.4rem}
.about{margin:.6rem .9rem;color:var(--muted);font-size:13.5px}
.turn{display:grid;grid-template-columns:5.4rem minmax(0,1fr);gap:.9rem;padding:.55rem .9rem;
border-left:4px solid var(--line);font-size:14px}
.turn+.turn{border-top:1px solid #eef1f4}
.turn p,.turn pre,.turn .think{margin:0 0 .35rem}
.turn div>:last-child{margin-bottom:0}
.role{font-size:12.5px;font-weight:650;padding-top:.1rem}
.turn.system{border-left-color:#8a94a1}.turn.system .role{color:#5f6b7a}
.turn.user{border-left-color:#cc79a7}.turn.user .role{color:#97406f}
.turn.assistant{border-left-color:#0072b2}.turn.assistant .role{color:#00598c}
.turn.tool{border-left-color:#009e73}.turn.tool .role{color:#00704f}
.words,.think,.answer{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.think{color:var(--muted);font-style:italic;padding-left:.8rem;border-left:2px solid var(--line)}
.answer{background:#e8f5ef;border:1px solid #b5ddcb;border-radius:5px;padding:.3rem .7rem;
width:fit-content}
.answer b{color:#00704f;font-size:12.5px;margin-right:.4rem}
.turn pre{unicode-bidi:isolate;padding:.4rem .7rem;border-radius:5px}
.call{background:#eaf3fa;border-color:#c2dcee}
.call.broken{background:#fdf0e9;border-color:#efc9b2}
.observation{background:#f4faf7;border-color:#d5ebe1}
.turn summary{font-size:12.5px;color:var(--muted);margin:.1rem 0 .35rem}
.empty{color:var(--muted)}
@media(max-width:40rem){.turn{display:block}}
"""
