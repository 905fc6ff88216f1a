"""Serves a checkpoint by the JAX engine, in SGLang's protocol.

    python launch/serve.py runs/quickstart/rl/hf
    SGLANG_API_KEY=... SGLANG_ADMIN_API_KEY=... python launch/serve.py DIRECTORY --host 0.0.0.0

Without SGLANG_ADMIN_API_KEY weights can be changed from this machine alone. Exit codes: 0 stopped,
2 a mistake (one line says which), 130 stopped before it served.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.run.start.signals import RESUMABLE, StopSignal, say
from agentcpm_jax.types import UserError


def main(argv: list[str] | None = None) -> int:
    """Parse, serve until stopped."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory with a tokenizer, or Hub id in the cache")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=30000, help="0 takes a free one")
    parser.add_argument("--slots", type=int, default=32, help="requests decoded together")
    parser.add_argument("--context", type=int, default=1024, help="tokens, prompt and completion")
    parser.add_argument("--chunk", type=int, default=32, help="tokens between two looks at control")
    parser.add_argument("--tensor", type=int, default=1, help="devices to split the model over")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    parser.add_argument("--weight-version", default="default", help="name of these weights")
    args = parser.parse_args(argv)
    try:
        with StopSignal(answer=say, promise="it had not begun to serve"):
            return work(args)
    except UserError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return RESUMABLE


def work(args: Namespace) -> int:
    from agentcpm_jax.engine.config import EngineConfig
    from agentcpm_jax.hf.tokenizer import served_chat

    engine = EngineConfig(slots=args.slots, capacity=args.context, tensor=args.tensor)
    path, chat = served_chat(args.model)  # a mistake is answered before jax is imported
    from agentcpm_jax.engine import server, serving

    place = server.ServerConfig(args.host, args.port)
    options = {"chunk": args.chunk, "weight_version": args.weight_version, "dtype": args.dtype}
    show = lambda url: print(f"serving {args.model} on {url}", flush=True)  # noqa: E731
    serving.serve(path, chat, engine, place, announce=show, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
