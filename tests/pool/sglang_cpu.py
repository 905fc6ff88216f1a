"""Entry point of a real SGLang 0.5.23 server on a machine without a GPU.

    python tests/pool/sglang_cpu.py --model-path DIRECTORY --port 30000 --device cpu ...
    python tests/pool/sglang_cpu.py router --port 30080 --worker-urls URL URL ...

Run by the interpreter of an environment of its own (`tests/pool/sglang_requirements.txt`). No file
of SGLang is changed. The placeholder below is safe for what is tested with it: dense models,
`torch_native` attention, one rank, no speculation; any call into it is an error.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import signal
import sys
import types
from collections.abc import Callable

# SGLang imports these names on a CPU even where it never calls them.
KERNELS = (
    "copy_all_layer_kv_cache_cpu",
    "assign_req_to_token_pool_cpu",
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_tree_kernel_efficient_cpu",
    "verify_tree_greedy_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
)


def stand_in() -> None:
    """What has to be there before SGLang is imported."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads on shared cores: 100 times slower
    import torch

    # torchvision's wheel is a CUDA build. Beside a CPU torch its library does not load, and its
    # import stops at two operators without a schema.
    global vision
    vision = torch.library.Library("torchvision", "DEF")  # the operators live as long as it does
    for operator in ("nms", "qnms"):
        vision.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if importlib.util.find_spec("sgl_kernel") is None:
        module = types.ModuleType("sgl_kernel")
        module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
        for name in KERNELS:
            setattr(module, name, absent(name))
        sys.modules["sgl_kernel"] = module


def absent(name: str) -> Callable[..., None]:
    def call(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(f"sgl_kernel.{name} was called, but there is no kernel wheel for CPUs")

    return call


ROUTER = sys.argv[1:2] == ["router"]
if ROUTER:
    # The router's package looks for SGLang's tracing; without it, it starts in a second.
    sys.modules["sglang"] = None  # type: ignore[assignment]
else:  # at module level: SGLang's own processes are spawned, and import this file again
    stand_in()


def main(argv: list[str]) -> None:
    # Tests that are killed cannot stop their servers: Linux does (1 is PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    # Until SGLang has a handler of its own: with all that it has begun to start.
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    if ROUTER:
        from sglang_router.launch_router import launch_router, parse_router_args

        launch_router(parse_router_args(argv[1:]))
        return
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(argv))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
