"""A user's Python functions as tools, in addition to those of another toolbox.

A tool is a plain or async function whose parameters are annotated with `str`, `int`, `float`,
`bool` or a list of one of these. The name, the first line of the docstring and the annotations are
the schema that the model sees; what it returns becomes the observation (text as it is, the rest as
JSON).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import threading
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentcpm_jax.dock.protocol import OpenToolbox, Toolbox
from agentcpm_jax.types import ToolResult, ToolStatus, UserError

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The OpenAI schema of a function.

    Raises:
      UserError: a parameter without a usable annotation, or a function without a docstring.
    """
    name = function.__name__
    lines = (inspect.getdoc(function) or "").strip().splitlines()
    if not lines:
        raise UserError(f"tool {name} has no docstring; its first line tells the model what it is")
    properties, required = {}, []
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        kind = _json_type(hints.get(parameter.name))
        if kind is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UserError(
                f"tool {name}: parameter {parameter} needs an annotation of str, int, float, bool "
                "or a list of these"
            )
        properties[parameter.name] = kind
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    function_schema = {"name": name, "description": lines[0], "parameters": parameters}
    return {"type": "function", "function": function_schema}


def with_functions(
    open_toolbox: OpenToolbox, functions: Sequence[Callable[..., Any]], deadline: float = 60.0
) -> OpenToolbox:
    """Opens the inner toolbox with `functions` added; one call may take `deadline` seconds."""
    schemas = {f.__name__: schema_of(f) for f in functions}
    if len(schemas) < len(functions):
        raise UserError(f"two tools of {[f.__name__ for f in functions]} have the same name")

    async def opened(task_meta: Mapping[str, Any], key: tuple[int, ...]) -> Toolbox:
        inner = await open_toolbox(task_meta, key)
        return FunctionToolbox(inner, {f.__name__: f for f in functions}, schemas, deadline)

    return opened


class FunctionToolbox:
    """A toolbox with functions added; all other calls go to the inner toolbox."""

    def __init__(
        self,
        inner: Toolbox,
        functions: Mapping[str, Callable[..., Any]],
        schemas: Mapping[str, Mapping[str, Any]],
        deadline: float,
    ) -> None:
        self._inner, self._functions, self._schemas = inner, functions, schemas
        self._deadline = deadline

    def schemas(self) -> Sequence[Mapping[str, Any]]:
        return (*self._inner.schemas(), *self._schemas.values())

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run one call; never raises for a failing function.

        An exception is an observation (`tool_error`); a time-out or a lost connection says nothing
        about the agent (`infra_error`).
        """
        if name not in self._functions:
            return await self._inner.call(name, arguments)
        parameters = self._schemas[name]["function"]["parameters"]
        if (refused := _check(name, parameters, arguments)) is not None:
            return ToolResult(ToolStatus.BAD_ARGUMENTS, refused)
        start = time.perf_counter()
        limit = asyncio.timeout(self._deadline or None)
        try:
            async with limit:
                value = await run_function(self._functions[name], **arguments)
            content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            status = ToolStatus.OK
        except Exception as error:  # whatever a user's function raises
            lost = limit.expired() or isinstance(error, ConnectionError | TimeoutError)
            status = ToolStatus.INFRA_ERROR if lost else ToolStatus.TOOL_ERROR
            why = f"no result within {self._deadline:g} s" if limit.expired() else str(error)
            content = f"{name}: {type(error).__name__}: {why}"
        return ToolResult(status, content, time.perf_counter() - start)

    async def close(self) -> None:
        await self._inner.close()


class NoTools:
    """A toolbox without tools, to which functions are added where a task has no others."""

    def schemas(self) -> Sequence[Mapping[str, Any]]:
        return ()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        return ToolResult(ToolStatus.TOOL_ERROR, f"no tool named {name}")

    async def close(self) -> None: ...


async def run_function(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a plain or async function, without blocking the event loop.

    A plain function runs in its own daemon thread: if the caller gives up on it, it blocks neither
    a thread pool nor the exit of the process.
    """
    if inspect.iscoroutinefunction(function):
        return await function(*args, **kwargs)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def work() -> None:
        value, error = None, None
        try:
            value = function(*args, **kwargs)
        except StopIteration as stop:  # a future cannot carry it
            error = RuntimeError(f"StopIteration: {stop}")
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, name=function.__name__, daemon=True).start()
    value = await future
    return await value if inspect.isawaitable(value) else value


def _json_type(hint: Any) -> dict[str, Any] | None:
    if hint in _JSON_TYPES:
        return {"type": _JSON_TYPES[hint]}
    if typing.get_origin(hint) is list and typing.get_args(hint)[0] in _JSON_TYPES:
        return {"type": "array", "items": _json_type(typing.get_args(hint)[0])}
    return None


def _check(name: str, schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    known = schema["properties"]
    for given, value in arguments.items():
        if given not in known:
            return f"{name} has no argument {given}, it takes {', '.join(known) or 'none'}"
        if not _fits(value, known[given]):
            kind = type(value).__name__
            return f"{name}: {given} must be {known[given]['type']}, not {kind}"
    for needed in schema["required"]:
        if needed not in arguments:
            return f"{name} needs the argument {needed}"
    return None


def _fits(value: Any, kind: Mapping[str, Any]) -> bool:
    if kind["type"] == "array":
        return isinstance(value, list) and all(_fits(v, kind["items"]) for v in value)
    if isinstance(value, bool):
        return kind["type"] == "boolean"
    allowed = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    return isinstance(value, allowed[kind["type"]])
