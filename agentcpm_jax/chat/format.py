"""Conversations as token ids: the published chat template, rendered once and then appended to.

Prompts, tool messages and canonical assistant messages read exactly as the template writes them.
What a model sampled is never rendered again: the environment appends the *delta*, the text that
the template would put after the assistant's own `<|im_end|>`.

Deviations from `AutoTokenizer.apply_chat_template`:
1. a role that the four Qwen3 templates do not know, and content that is not text, are refused;
2. control tokens spelt out in user text, tool results, tool schemas or call arguments are encoded
   as ordinary text (`chat/tokenizer.py`); the ids of harmless text are the same;
3. half of a surrogate pair, which tools return and models write, is rendered as U+FFFD: there is
   no UTF-8 for it. Other text is kept as it is; the tokenizer alone normalises it.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from agentcpm_jax.chat.tokenizer import OBSERVED, SLOT, MarkedTokenizer
from agentcpm_jax.types import Provenance, Segment, UserError

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
TEMPLATES = ("qwen3-hybrid", "qwen3-thinking-2507", "qwen3-instruct-2507", "qwen3-2025-04")
IM_END = "<|im_end|>"


class ChatTemplateError(UserError):
    """A conversation that the chat template cannot render."""


def template_text(name: str) -> str:
    """The text of one of the four published Qwen3 templates, `TEMPLATES`."""
    if name not in TEMPLATES:
        raise UserError(f"unknown chat template {name!r}; use one of {', '.join(TEMPLATES)}")
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


class ChatFormat:
    """A tokenizer and a template; `template_kwargs` (e.g. enable_thinking) go to every render."""

    def __init__(self, tokenizer: Tokenizer, template: str, template_kwargs: Message) -> None:
        self._tokens = MarkedTokenizer(tokenizer)
        self._template = _compile(template)
        self._kwargs = dict(template_kwargs)
        ids = self._tokens.ids
        if IM_END not in ids:
            raise UserError(f"tokenizer has no added token {IM_END}; use a Qwen3-style tokenizer")
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.im_end_id: int = ids[IM_END]
        self.tool_call_start_id: int | None = ids.get("<tool_call>")
        self.tool_call_end_id: int | None = ids.get("</tool_call>")
        ends = (ids.get(name) for name in (IM_END, "<|endoftext|>"))
        self.stop_ids: tuple[int, ...] = tuple(i for i in ends if i is not None)

    @classmethod
    def from_parts(
        cls, tokenizer: Tokenizer, template_text: str, **template_kwargs: Any
    ) -> ChatFormat:
        """From a `tokenizers.Tokenizer` and the text of a template."""
        return cls(tokenizer, template_text, template_kwargs)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The template's text, exactly.

        Raises `ChatTemplateError` for an unknown role, content that is not text, or a conversation
        that the template itself refuses.
        """
        marked = self._render(messages, tools, add_generation_prompt, **kwargs)
        return self._tokens.restore(marked)

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None
    ) -> np.ndarray:
        """i32[P]: the rendered conversation up to and including the generation prompt."""
        return _i32(self._tokens.encode(self._render(messages, tools, True))[0])

    def delta_tokens(self, appended: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """What the environment appends after the assistant's own `<|im_end|>`.

        All tool results of one turn belong in one call. Ends with the next generation prompt.

        Returns:
          ids i32[D] and provenance u8[D] (TOOL inside an observation, else TEMPLATE).
        """
        ids, observed = self._tokens.encode(self._delta(appended))
        provenance = np.where(observed, Provenance.TOOL, Provenance.TEMPLATE)
        return _i32(ids), provenance.astype(np.uint8)

    def assistant_ids(self, message: Message) -> np.ndarray:
        """i32[N]: the completion that says `message`, up to and with `<|im_end|>`."""
        return _i32(self._tokens.encode(self._assistant(message))[0])

    def demo_segment(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        context: Collection[int] = (),
    ) -> Segment:
        """A whole conversation, append-only, exactly as a rollout would have seen it.

        Assistant messages are DEMO (those of the indices `context` HISTORY, which is not trained),
        observations TOOL, the rest TEMPLATE. What follows the last assistant message is left out.
        Raises `ChatTemplateError` without an assistant message.
        """
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            raise ChatTemplateError(
                "demonstration has no assistant message; add one or drop the row"
            )
        prompt = self.prompt_ids(messages[: turns[0]], tools)
        parts = [(prompt, np.full(len(prompt), Provenance.TEMPLATE, np.uint8))]
        for here, there in zip(turns, [*turns[1:], None], strict=True):
            said = self.assistant_ids(messages[here])
            wrote = Provenance.HISTORY if here in context else Provenance.DEMO
            parts.append((said, np.full(len(said), wrote, np.uint8)))
            if there is not None:
                parts.append(self.delta_tokens(messages[here + 1 : there]))
        ids = np.concatenate([ids for ids, _ in parts])
        return Segment(
            ids=ids,
            provenance=np.concatenate([provenance for _, provenance in parts]),
            logprob=np.full(len(ids), np.nan, np.float32),
            version=np.full(len(ids), -1, np.int32),
        )

    def encode_text(self, text: str) -> np.ndarray:
        """i32[T]: plain text, in which control tokens are ordinary characters."""
        return _i32(self._tokens.encode(self._tokens.mark_data(text))[0])

    def raw_ids(self, text: str) -> np.ndarray:
        """i32[T]: text that was rendered before, in which control tokens are control tokens."""
        return _i32(self._tokens.encode(self._tokens.mark_nothing(text))[0])

    def with_kwargs(self, **template_kwargs: Any) -> ChatFormat:
        """This format, whose every render gets these variables too."""
        other = copy.copy(self)
        for name in ("in_thought", "_generation_prefix"):  # what was computed without them
            other.__dict__.pop(name, None)
        other._kwargs = {**self._kwargs, **template_kwargs}
        return other

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, control tokens included."""
        return self._tokens.decode(ids)

    def token_spans(
        self, ids: Sequence[int] | np.ndarray, char_spans: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Token spans [start, end) of `ids` that cover ascending spans of `decode(ids)`."""
        return self._tokens.token_spans(ids, char_spans)

    @functools.cached_property
    def in_thought(self) -> bool:
        """Whether the generation prompt leaves a thought open, as Thinking-2507's does."""
        prompt = self._generation_prefix
        return prompt.rfind("<think>") > prompt.rfind("</think>")

    @functools.cached_property
    def _generation_prefix(self) -> str:
        return self._render([_ANY_QUESTION], None, True)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        add_generation_prompt: bool,
        **kwargs: Any,
    ) -> str:
        marked = [self._mark(i, message) for i, message in enumerate(messages)]
        return self._render_marked(marked, tools, add_generation_prompt, **kwargs)

    def _render_marked(
        self,
        marked: Sequence[Message],
        tools: Sequence[Message] | None,
        add_generation_prompt: bool,
        **kwargs: Any,
    ) -> str:
        try:
            return self._template.render(
                messages=marked,
                tools=self._mark_data(list(tools)) if tools is not None else None,
                add_generation_prompt=add_generation_prompt,
                **{**self._kwargs, **kwargs},
            )
        except Exception as error:  # whatever a template's expressions raise
            what = f"{type(error).__name__}: {error}"
            raise ChatTemplateError(
                f"chat template cannot render this conversation: {what}; correct the messages"
            ) from error

    def _mark(self, index: int, message: Message) -> dict[str, Any]:
        """A copy of `message` with its text marked as not the template's."""
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ChatTemplateError(f"unknown role {role!r} in message {index}; use {_ROLES}")
        if not isinstance(content, str) and not (role == "assistant" and content is None):
            raise ChatTemplateError(
                f"content of message {index} ({role}) is {type(content).__name__}; use text"
            )
        marked = {
            key: value if key == "role" else self._mark_data(value)
            for key, value in message.items()
        }
        if role == "tool":
            marked["content"] = OBSERVED + marked["content"]
        elif role in ("system", "assistant"):
            for key in ("content", "reasoning_content"):
                if isinstance(message.get(key), str):
                    marked[key] = self._tokens.mark_program(message[key])
        return marked

    def _mark_data(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._tokens.mark_data(value)
        if isinstance(value, Mapping):
            return {self._mark_data(k): self._mark_data(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark_data(v) for v in value]
        return value

    def _delta(self, appended: Sequence[Message]) -> str:
        marked = [self._mark(i, message) for i, message in enumerate(appended)]
        text = self._render_marked([_ANY_QUESTION, _ANY_REPLY, *marked], None, True)
        _, found, rest = text.partition(SLOT + IM_END)
        if not found:
            raise UserError(f"chat template does not end an assistant message with {IM_END}")
        return rest

    def _assistant(self, message: Message) -> str:
        message = {**message, "content": message.get("content") or ""}
        text = self._render([_ANY_QUESTION, message], None, False)
        prefix = self._generation_prefix
        if not text.startswith(prefix):
            raise ChatTemplateError(
                "assistant message does not continue the generation prompt "
                f"{self._tokens.restore(prefix)[-40:]!r}; its thought does not fit the template"
            )
        return text[len(prefix) : text.rindex(IM_END) + len(IM_END)]


_ROLES = ", ".join(ROLES)
_ANY_QUESTION = {"role": "user", "content": "q"}
_ANY_REPLY = {"role": "assistant", "content": SLOT}


def _i32(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _compile(template: str) -> jinja2.Template:
    """Compile the template in the sandbox and with the functions that `transformers` provides."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template, line {error.lineno}: {error.message}; fix it") from None


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
