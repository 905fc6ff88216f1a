"""What listens does so on loopback unless told otherwise, and SECURITY.md says so."""

from __future__ import annotations

import ast
from pathlib import Path

from agentcpm_jax.engine.server import ServerConfig

ROOT = Path(__file__).parents[2]
PROSE = (ROOT / "SECURITY.md").read_text()


def defaults(script: Path) -> dict[str, object]:
    """Flag -> default, of a launcher's parser."""
    found = {}
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            flag = ast.literal_eval(node.args[0])
            values = [ast.literal_eval(k.value) for k in node.keywords if k.arg == "default"]
            found[flag] = values[0] if values else None
    return found


def test_what_listens_is_on_loopback_and_in_the_table() -> None:
    listening = {
        script.name: found
        for script in (ROOT / "launch").glob("*.py")
        if "--host" in (found := defaults(script))
    }
    assert listening.keys() == {"serve.py", "pool_agent.py"}
    for name, found in listening.items():
        assert found["--host"] == "127.0.0.1"
        assert f"| `launch/{name}` | 127.0.0.1:{found['--port']} |" in PROSE
    assert ServerConfig().host == "127.0.0.1"


def test_no_program_names_every_address() -> None:
    """Of all that is written in Python; the scripts of GPU hosts ask for a key."""
    files = [*(ROOT / "agentcpm_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    wide = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::", "[::]")
    }
    assert wide == set()


def test_the_environment_variables_of_the_keys_are_named() -> None:
    for name in ("SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY", "JUDGE_API_KEY"):
        assert f"`{name}`" in PROSE
        read = [p for p in (ROOT / "agentcpm_jax").rglob("*.py") if name in p.read_text()]
        assert read, f"nobody reads {name}"
