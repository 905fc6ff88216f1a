"""The in-process JAX engine: a `TokenPolicy` with continuous batching and a KV cache.

Requests of any number of episodes are decoded together, K tokens per device call. A row of the
cache keeps its keys and values between the turns of an episode, so a turn costs only its new
tokens; a prefix that another row holds, as within a group, is copied on the device. Long prompts
are fed in chunks between which the others go on decoding. A weight update takes effect between two
decode chunks: cached keys and values are dropped and re-made under the new weights, so every
token's log-probability is exactly that of the version stamped on it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import jax
import numpy as np

from agentcpm_jax.engine.config import MAX_STOP_IDS, MAX_TEMPERATURE, EngineConfig, up_to
from agentcpm_jax.engine.device import copy_prefix, decode, empty_rows, prefill
from agentcpm_jax.engine.running import Running, failed
from agentcpm_jax.engine.slots import CacheSlot, Slots
from agentcpm_jax.engine.weights import make_cache, make_mesh_of, own_copy
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest

LEAST_STEPS = 4  # of a chunk that ends early
#: Prompt tokens, with padding, that are fed between two chunks of decoding: a long prompt must not
#: make the others wait.
PREFILL_TOKENS = 8192
#: Of sampling parameters; outside of them arrays of 32 bits would overflow.
_RANGES = {
    "temperature": (0, MAX_TEMPERATURE),
    "top_k": (-1, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
}


class LocalEngine:
    """Continuous batching over a fixed number of slots; one engine thread, started on first use.

    Args:
      params: the tree of `params.init`; copied.
      text: ids to text, needed for stop strings alone.
      deterministic: one shape and no prefix reuse, which makes a row's bits independent of what
        else runs.
      reuse: keep and copy prefixes.

    Raises:
      UserError: fewer than `cfg.tensor` devices, or they do not divide the model.
    """

    def __init__(
        self,
        params: dict,
        model: ModelConfig,
        cfg: EngineConfig,
        *,
        version: int = 0,
        text: Callable[[Sequence[int]], str] | None = None,
        deterministic: bool = False,
        reuse: bool = True,
    ) -> None:
        self.cfg, self.model, self._text = cfg, model, text
        self.deterministic, self._reuse = deterministic, reuse and not deterministic
        self._mesh = make_mesh_of(cfg.tensor)
        self._params, self.version = own_copy(params, model, self._mesh), version
        self._next_params: tuple[dict, int] | None = None
        self._cache = make_cache(model, cfg.slots, cfg.capacity, self._mesh)
        self._slots = Slots(cfg.slots, cfg.capacity)
        self._rows = empty_rows(cfg.slots)
        self._waiting: deque[Running] = deque()
        self._running: dict[int, Running] = {}
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failure = ""
        self.programs: set[tuple] = set()  # device programs used so far
        self.tokens_sampled = 0
        self.tokens_prefilled = 0
        self.tokens_reused = 0  # prompt tokens that were found in the cache

    # --- the policy ------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Completion:
        """One completion; an engine failure has `finish=error` and never raises."""
        budget = min(request.max_new_tokens, self.cfg.capacity - len(request.prompt_ids))
        if problem := self._problem(request, budget):
            return failed(problem)
        run = Running.of(request, budget)
        with self._wake:
            if self._closed or self._failure:
                return failed(self._failure or "engine is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
                self._thread.start()
            self._waiting.append(run)
            self._wake.notify()
        return await run.future

    def set_params(self, params: dict, version: int) -> None:
        """Use a copy of `params` from the next decode chunk on; the caller may donate its own."""
        copied = own_copy(params, self.model, self._mesh)
        with self._wake:
            self._next_params = (copied, version)
            if not self._running and not self._waiting:
                self._swap()
            self._wake.notify()

    def flush(self) -> bool:
        """Forget all cached prefixes; while requests run, does nothing and returns False."""
        with self._wake:
            if self._running or self._waiting:
                return False
            self._slots.forget()
            return True

    @property
    def failure(self) -> str:
        """What ended the engine thread; empty while it is well."""
        return self._failure

    def close(self) -> None:
        """Abort all requests and end the engine thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _problem(self, request: SampleRequest, budget: int) -> str:
        """Why this request cannot be sampled: it fails here, alone, and not in the thread of all.

        Empty when it can.
        """
        prompt, params = np.asarray(request.prompt_ids), request.params
        vocabulary = self.model.vocab_size
        if not len(prompt):
            return "the prompt is empty"
        if prompt.dtype.kind not in "iu" or prompt.min() < 0 or prompt.max() >= vocabulary:
            return f"the prompt holds what is none of the vocabulary's {vocabulary} ids"
        if budget <= 0:
            return (
                f"prompt of {len(prompt)} tokens leaves no room in a context of "
                f"{self.cfg.capacity}; raise engine.capacity or shorten the prompt"
            )
        for name, (low, high) in _RANGES.items():
            if not low <= (value := getattr(params, name)) <= high:
                return f"{name}={value!r}; give a number from {low} to {high}"
        if len(params.stop_ids) > MAX_STOP_IDS:
            return f"{len(params.stop_ids)} stop ids; at most {MAX_STOP_IDS}"
        if not all(0 <= i < 2**31 for i in params.stop_ids):
            return f"stop_ids={params.stop_ids!r}; give ids from 0 to 2**31 - 1"
        if params.stop_strings and self._text is None:
            return "stop strings need an engine with a tokenizer; use stop ids"
        return ""

    # --- the engine thread -----------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._waiting or self._running or self._closed):
                        self._wake.wait()
                    if self._closed:
                        break
                    if self._next_params is not None:
                        self._swap()
                    self._drop_dead()
                    self._admit()
                if self._running:
                    self._feed_prompts()
                    self._decode_chunk()
        except BaseException as error:  # the thread must never die silently: everyone waits on it
            self._failure = f"engine failed: {type(error).__name__}: {error}"
            logging.getLogger(__name__).exception("the engine has failed and samples no more")
        reason = self._failure or "engine is closed"
        with self._wake:
            for run in [*self._running.values(), *self._waiting]:
                finish = Finish.ERROR if self._failure else Finish.ABORT
                run.resolve(finish, reason)
            self._running.clear()
            self._waiting.clear()

    def _swap(self) -> None:
        assert self._next_params is not None
        self._params, self.version = self._next_params
        self._next_params = None
        self._slots.forget()
        if self._reuse:  # what texts have in common is fed once
            for run, place in zip(
                self._running.values(), self._slots.replace(list(self._running)), strict=True
            ):
                self._settle(run, place)

    def _drop_dead(self) -> None:
        """End requests whose deadline has passed or whose caller was cancelled."""
        now = time.monotonic()

        def dead(run: Running) -> bool:
            if now > run.deadline and not run.future.cancelled():
                run.resolve(Finish.ABORT, "deadline passed")
            return now > run.deadline or run.future.cancelled()

        self._waiting = deque(run for run in self._waiting if not dead(run))
        for slot in [slot for slot, run in self._running.items() if dead(run)]:
            self._leave(slot)

    def _admit(self) -> None:
        """Give waiting requests a slot, first come first served."""
        while self._waiting and len(self._running) < self.cfg.slots:
            run = self._waiting[0]  # where it is found, should anything fail here
            place = self._slots.place(run.prompt, reuse=self._reuse)
            self._slots.take(place, run.prompt)
            run.cached = place.kept
            self.tokens_reused += place.kept
            self._set_row(place.slot, run)
            self._settle(run, place)
            self._running[place.slot] = self._waiting.popleft()

    def _settle(self, run: Running, place: CacheSlot) -> None:
        run.place, run.leader = place, self._running.get(place.source)
        self._copy_prefix(run)

    def _set_row(self, slot: int, run: Running) -> None:
        rows, params = self._rows, run.request.params
        rows.index[slot], rows.generated[slot], rows.budget[slot] = slot, 0, run.budget
        rows.stop[slot] = -1
        rows.stop[slot, : len(params.stop_ids)] = params.stop_ids
        rows.draw.temperature[slot], rows.draw.key[slot] = params.temperature, run.key
        rows.draw.top_k[slot], rows.draw.top_p[slot] = max(params.top_k, 0), params.top_p
        rows.draw.min_p[slot] = params.min_p

    def _copy_prefix(self, run: Running) -> bool:
        """Copy the shared prefix from another row; False while that row does not hold it yet."""
        place = run.place
        if place.source < 0:
            return True
        slots, shared = self._slots, place.shared
        text = slots.text[place.slot, :shared]
        if slots.holds(place.source, text):
            short = slots.fed[place.source] < shared
            if short and run.leader is not None and self._running.get(place.source) is run.leader:
                return False
            shared = min(shared, int(slots.fed[place.source]))
            if shared > slots.fed[place.slot]:
                filled = self._length_bucket(shared)
                self.programs.add(("copy", filled))
                source, target = np.int32(place.source), np.int32(place.slot)
                self._cache = copy_prefix(self._cache, source, target, filled)
                saved = shared - int(slots.fed[place.slot])
                self.tokens_reused += saved
                run.cached += 0 if run.ids else saved
                slots.fed[place.slot] = shared
        run.place, run.leader = CacheSlot(place.slot, place.kept), None
        return True

    def _feed_prompts(self) -> None:
        """Prefill until each running row has exactly one token that is not in the cache, or, when
        some rows are there, until `PREFILL_TOKENS` have been fed."""
        fed = 0
        while True:
            settled = [slot for slot, run in self._running.items() if self._copy_prefix(run)]
            missing = self._slots.known - self._slots.fed
            pending = [slot for slot in settled if missing[slot] > 1]
            if not pending or (fed >= PREFILL_TOKENS and len(pending) < len(settled)):
                return
            fed += self._feed(pending, missing)

    def _feed(self, pending: Sequence[int], missing: np.ndarray) -> int:
        """Prefill in one device call; returns the tokens fed, padding included."""
        slots, buckets = self._slots, self.cfg.token_buckets
        width = buckets[-1]
        if not self.deterministic:
            pending = pending[: max(PREFILL_TOKENS // width, 1)]
            width = _bucket(int(missing[pending].max()) - 1, buckets)
        size, placed = self._place_rows(pending)
        tokens = np.zeros((size, width), np.int32)
        counts, lengths = np.zeros(size, np.int32), np.zeros(size, np.int32)
        index = np.full(size, self.cfg.slots, np.int32)
        for row, slot in placed:
            start, count = slots.fed[slot], min(width, missing[slot] - 1)
            tokens[row, :count] = slots.text[slot, start : start + count]
            counts[row], lengths[row], index[row] = count, start, slot
            slots.fed[slot] += count
            self.tokens_prefilled += int(count)
        filled = self._length_bucket(int(lengths.max()))
        self.programs |= {("read", size, filled), ("feed", size, width, filled)}
        whole = size == self.cfg.slots
        self._cache = prefill(
            self._params, self.model, self._cache, index, lengths, tokens, counts, filled, whole
        )
        return size * width

    def _decode_chunk(self) -> None:
        slots = self._slots
        ready = [s for s in self._running if slots.known[s] - slots.fed[s] == 1]
        size, placed = self._place_rows(ready)
        take = np.full(size, self.cfg.slots)
        for row, slot in placed:
            take[row] = slot
        everyone = np.arange(self.cfg.slots)
        self._rows.length[:-1] = slots.fed
        self._rows.token[:-1] = slots.text[everyone, np.maximum(slots.known - 1, 0)]
        rows = jax.tree.map(lambda x: x[take], self._rows)
        filled = self._length_bucket(int(rows.length.max()))
        self.programs.add(("decode", size, filled))
        # With requests waiting for a slot, a chunk may end with a row; never where bits matter.
        hurry = self._waiting and not self.deterministic
        least = np.int32(min(LEAST_STEPS, self.cfg.chunk) if hurry else self.cfg.chunk)
        whole = size == self.cfg.slots
        self._cache, *out = decode(
            self._params, self.model, self._cache, rows, least, self.cfg.chunk, filled, whole
        )
        ids, logprobs, counts = jax.device_get(out)
        for row, slot in placed:
            self._advance(slot, ids[: counts[row], row], logprobs[: counts[row], row])

    def _advance(self, slot: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Record what a row has sampled; end its request if it is finished."""
        run = self._running[slot]
        self._slots.append(slot, ids)
        self._rows.generated[slot] += len(ids)
        self._rows.budget[slot] -= len(ids)
        self.tokens_sampled += len(ids)
        start = len(run.ids)
        finish = run.record(ids, logprobs, self.version, self._text)
        run.report(start)
        if finish:
            self._leave(slot)
            run.resolve(finish)

    # --- small parts -----------------------------------------------------------------------

    def _leave(self, slot: int) -> None:
        del self._running[slot]
        self._slots.release(slot)

    def _place_rows(self, slots: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
        """Number of rows and (row, slot) pairs; with a row for every slot, a slot is its own."""
        size = self.cfg.slots
        if not self.deterministic:
            size = _bucket(len(slots), up_to(self.cfg.slots, self.cfg.row_buckets))
        same = size == self.cfg.slots
        return size, [(s, s) if same else (i, s) for i, s in enumerate(slots)]

    def _length_bucket(self, length: int) -> int:
        if self.deterministic:
            return self.cfg.capacity
        return _bucket(length, up_to(self.cfg.capacity, self.cfg.length_buckets))


def _bucket(count: int, buckets: Sequence[int]) -> int:
    return next((b for b in buckets if b >= count), buckets[-1])
