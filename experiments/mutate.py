"""Breaks the code one line at a time: a test has to notice each.

    python experiments/mutate.py                # all of them; ten minutes on two cores
    python experiments/mutate.py --only S4,W5   # some
    python experiments/mutate.py --list

Every mutation of `TABLE` is applied to a copy of the checkout, and the tests named with it run
there. It is killed when one of them fails, or hangs for `PATIENCE` seconds. Exits 1 when one
survives that is not said to be equivalent, and 2 when the table no longer fits the code or the
tests fail without any mutation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600.0
PASSED, FAILED = 0, 1  # exit codes of pytest

#: A block per mutation: its id, file and meaning; `-` the text, found once in the file; `+` what
#: takes its place; `?` a test that fails then; `=` why none can.
TABLE = r"""
A1 rewards/advantages.py: the baseline leaves the own score out
- return s - (s.sum() - s) / (len(s) - 1)
+ return s - s.mean()
? rewards/test_advantages.py::test_leave_one_out_is_the_mean_of_the_others
A2 rewards/advantages.py: a repeated turn earns no credit
- if TurnFlag.REPEATED in turn.flags or any(
+ if any(
? rewards/test_advantages.py::test_repeated_turns_and_calls_that_cannot_be_located_lose_the_turn
A3 rewards/advantages.py: tokens shared with the parent are not trained again
- keep[: segment.shared_prefix_len] = False
+ pass
? rewards/test_advantages.py::test_every_segment_gets_credit_but_a_shared_prefix_only_once
A4 rewards/advantages.py: truncated turns are not trained
- in muted_turns or TurnFlag.TRUNCATED in turn.flags:
+ in muted_turns:
? rewards/test_advantages.py::test_truncated_and_muted_turns_are_not_trained
A5 rewards/advantages.py: a score at the threshold is not right
- right = score > cfg.right_above
+ right = score >= cfg.right_above
? rewards/test_advantages.py::test_a_score_at_the_threshold_is_not_right
A6 rewards/advantages.py: the overlong penalty counts sampled tokens
- lengths = [sum(int(s.sampled.sum()) for s in t.segments)
+ lengths = [sum(len(s) for s in t.segments)
? rewards/test_advantages.py::test_overlong_trajectories_are_punished_for_what_they_wrote
D1 rewards/denoise.py: muted samples stay in the baseline
- baseline=tuple(t for t in state.baseline if t.sample not in dropped)
+ baseline=tuple(t for t in state.baseline if t.sample not in dropped | muted)
? rewards/test_denoise.py::test_extreme_stops_are_muted_and_their_score_stays_in_the_baseline
D2 rewards/denoise.py: a tie is no agreement
- settled = count > AGREEMENT * len(same)
+ settled = count >= AGREEMENT * len(same)
? rewards/test_denoise.py::test_equal_answers_without_a_majority_all_leave
D3 rewards/denoise.py: the spread has a threshold
- max(scores) - min(scores) < cfg.min_spread
+ max(scores) == min(scores)
? rewards/test_denoise.py::test_the_spread_is_compared_with_the_threshold
T1 rollout/staleness.py: the admission budget
- (self.max_staleness + self.version + 1) * self.batch_size
+ (self.max_staleness + self.version) * self.batch_size
? rollout/test_staleness.py::test_admission_follows_areal
T2 rollout/staleness.py: segments that are too old leave before their group does
- if max(vs) >= limit}
+ if min(vs) >= limit}
? rollout/test_staleness.py::test_choose_is_oldest_first_and_drops_segments_before_groups
T3 rollout/staleness.py: how long a batch may wait
- max_staleness < step + 1 + k // batch_size
+ max_staleness < step + k // batch_size
? rollout/test_staleness.py::test_wait_holds_a_batch_back_for_a_group_that_would_grow_too_old
T4 rollout/staleness.py: the age is that of trained tokens
- trained = segment.sampled & np.asarray(keep, bool)
+ trained = segment.sampled
? rollout/test_staleness.py::test_age_counts_trained_tokens_only
R1 data/rows.py: a row ends behind its last trained token
- int(trained[-1]) + 1 if len(trained) else 0
+ int(trained[-1]) if len(trained) else 0
? data/test_rows.py::test_a_fork_that_continues_its_parent_becomes_one_row
R2 data/rows.py: only sampled tokens are trained
- mask = sampled & np.asarray(credit.keep, bool)
+ mask = np.asarray(credit.keep, bool)
? data/test_rows.py::test_only_sampled_and_kept_tokens_are_trained_in_rl
R3 data/rows.py: a token of two forks is trained once
- mask[:n] &= ~(earlier.loss_mask[:n] & _same_values(row, earlier, n))
+ pass
? data/test_rows.py::test_merged_rows_are_the_leaves_of_the_trie
P1 data/pack.py: sequences without a trained token are not counted
- num_sequences=np.float32(sum(n > 0 for n in trained))
+ num_sequences=np.float32(len(trained))
? data/test_pack.py::test_what_is_packed_and_what_is_rejected_make_up_the_rows
P2 data/pack.py: bins of one length share a micro-batch
- return [bins[(r % count) * micro_rows + r // count] for r in range(num_rows)]
+ return bins
? data/test_pack.py::test_padding_is_left_to_as_few_forward_passes_as_possible
P3 data/pack.py: an exact fit is the best one
- bisect.bisect_left(open_bins, (n, -1))
+ bisect.bisect_left(open_bins, (n + 1, -1))
? data/test_pack.py::test_best_fit_decreasing_is_stable
C1 rollout/episode.py: the environment closes a turn that ended in another way
- int(completion.ids[-1]) == self._chat.im_end_id:
+ int(completion.ids[-1]) in self._chat.stop_ids:
? rollout/test_stops.py::test_the_environment_closes_what_the_policy_left_open
C2 rollout/episode.py: a turn starts only with the reserve at hand
- len(self._pending[0]) + cfg.reserve > cfg.max_context
+ len(self._pending[0]) > cfg.max_context
? rollout/test_stops.py::test_a_turn_starts_only_with_the_reserve_at_hand
C3 chat/tokenizer.py: the assistant's tags are control tokens
- return self._mark(text, self._special)
+ return self._mark(text, self._control)
? chat/test_format.py::test_text_is_the_templates
C4 rollout/episode.py: progress resets the idle count
- self._idle = 0 if progress else self._idle + 1
+ self._idle = self._idle + 1
? rollout/test_stops.py::test_progress_resets_the_idle_count
E1 log/experience.py: a shipped batch survives a power cut
- self._write(durable=True, announces=("shipped",))
+ self._write(announces=("shipped",))
? log/test_experience.py::test_a_shipped_batch_survives_a_power_cut
E2 log/experience.py: an issue changes its state once
- .where(c.issue_id == issue_id, c.state.in_(list(old)))
+ .where(c.issue_id == issue_id)
? log/test_experience.py::test_each_issue_ends_exactly_once
E3 log/experience.py: an attempt recorded again takes the place of the first
- c.attempt >= traj.attempt]
+ c.attempt > traj.attempt]
? log/test_experience.py::test_the_last_attempt_counts_and_a_rerun_forgets_later_ones
E4 rollout/producer.py: groups that are ready at a restart count as accepted
- accepted=shipped + len(self.ready)
+ accepted=shipped
? rollout/test_stream_schedules.py::test_no_schedule_breaks_a_bound_or_loses_a_slot
E5 rollout/producer.py: a restart does not reuse what is too old
- and (self._cfg.deterministic or t.versions[0] >= limit)
+
? rollout/test_stream.py::test_a_restart_samples_anew_what_grew_too_old_to_be_trained
E6 rollout/groups.py: how often a sample is retried
- if attempt > self._cfg.retries:
+ if attempt >= self._cfg.retries:
? rollout/test_stream_ends.py::test_a_failed_sample_is_retried_alone
E7 log/schema.py: the database refuses a segment that was shipped
- sa.UniqueConstraint("issue_id", "sample", "segment"),
+
? log/test_experience.py::test_the_database_itself_refuses_to_ship_a_segment_twice
K1 engine/slots.py: the last token of a cached prompt is fed again
- shared = np.minimum(self.shared(prompt), len(prompt) - 1)
+ shared = self.shared(prompt)
? engine/test_slots.py::test_a_group_copies_the_prompt_of_its_first_sample
K2 engine/slots.py: new weights leave nothing cached, of busy rows neither
- self.fed[:] = 0
+ self.fed[~self.busy] = 0
? engine/test_slots.py::test_new_weights_leave_nothing_cached
K3 engine/slots.py: a released row knows only what was fed
- self.known[slot] = self.fed[slot]
+ pass
? engine/test_slots.py::test_the_next_turn_finds_its_own_row
K4 model/decode.py: ignored tokens are not written
- jnp.where(offsets < counts[:, None]
+ jnp.where(offsets <= counts[:, None]
? model/test_decode.py::test_rows_with_count_zero_keep_every_bit
K5 engine/local.py: a follower waits for its leader
- if short and run.leader is not None and self._running.get(place.source) is run.leader:
+ if False:
? engine/test_local.py::test_a_group_feeds_its_common_prompt_once_and_stays_exact
W1 weights/publish.py: a version that was collected is not published again
- if version in stable or is_collected(version, stable):
+ if version in stable:
? weights/test_publish.py::test_no_version_is_published_again_not_even_one_that_was_collected
W2 weights/store.py: the newest version is never collected
- [v for v in versions(root)[:-1] if v < keep_from]
+ [v for v in versions(root) if v < keep_from]
? weights/test_store.py::test_garbage_collection_keeps_the_newest
W3 weights/mirror.py: a mirrored file is compared by its checksum
- if digest.hexdigest() == expected[CHECKSUM]:
+ if size == expected["bytes"]:
? weights/test_mirror.py::test_a_part_that_is_not_the_files_is_made_anew
W4 pool/interruption.py: empty answers are bounded
- failures = 0 if len(chunk.ids) else failures + 1
+ failures = 0
? pool/test_servers.py::test_a_fault_that_stays_is_a_named_error_within_the_deadline
W5 pool/protocol.py: weights older than at send are refused
- if version < max(expected.oldest, 0):
+ if version < 0:
? pool/test_protocol.py::test_weights_older_than_at_send_are_lost_weights
W6 pool/interruption.py: an interruption uses up the budget
- budget = request.max_new_tokens - len(kept.ids)
+ budget = request.max_new_tokens
? pool/test_interruption.py::test_however_it_is_interrupted_the_completion_is_the_same
L1 train/losses/objectives.py: the importance weight has a ceiling
- return jnp.minimum(ratio, cfg.ratio_cap)
+ return jnp.maximum(ratio, cfg.ratio_cap)
? train/losses/test_objectives.py::test_dppo_bounds_probabilities_not_ratios
L2 train/losses/objectives.py: the region looks at the side that the gradient pushes to
- (too_low & (x.advantages < 0))
+ (too_low & (x.advantages > 0))
? train/losses/test_objectives.py::test_minirl_bounds_cut_only_on_the_side_the_gradient_pushes
L3 train/losses/objectives.py: the ratio of GSPO is clamped
- jnp.exp(jnp.minimum(log_s, GSPO_CLAMP))
+ jnp.exp(log_s)
? train/losses/test_objectives.py::test_gspo_stops_at_the_clamp_of_its_ratio
L4 train/losses/objectives.py: the band shrinks with age
- cfg.widen * jnp.exp(-cfg.decay
+ cfg.widen * jnp.exp(cfg.decay
? train/losses/test_objectives.py::test_the_band_tightens_with_age
L5 train/losses/policy.py: the correction reads the proximal policy
- top = x.logprobs if cfg.proximal == "bypass" else x.proximal
+ top = x.logprobs
? train/losses/test_objectives.py::test_decoupled_ppo_weights_by_the_proximal_policy
L6 train/losses/policy.py: the value of k3 is clamped
- value_clamp=cfg.kl_clamp if cfg.kl.startswith("k3") else 0.0
+ value_clamp=0.0
? train/losses/test_policy.py::test_beyond_the_clamp_of_its_value_the_kl_pulls_no_more
L7 train/losses/policy.py: the ratio that weights the KL is a constant
- kl = kl * jax.lax.stop_gradient(jnp.exp(
+ kl = kl * (jnp.exp(
? train/losses/test_policy.py::test_the_ratio_that_weights_the_kl_is_a_constant
L8 train/losses/aggregate.py: a row may hold as many sequences as tokens
- slots = values.shape[1] + 1
+ slots = values.shape[1]
? train/losses/test_policy.py::test_a_row_may_hold_as_many_sequences_as_tokens
L9 train/losses/correction.py: the log-linear policy is one version old
- alpha = jnp.clip((age - 1.0) /
+ alpha = jnp.clip(age /
? train/losses/test_correction.py::test_log_linear_by_age
L10 train/losses/correction.py: the ratio of a sequence is bounded
- jnp.exp(jnp.clip(per_token, -CLAMP, CLAMP))
+ jnp.exp(per_token)
? train/losses/test_correction.py::test_the_ratio_of_a_long_sequence_is_bounded_under_any_rule
L11 train/losses/kl.py: k1+ and k3+ have the gradient of k2
- return k2 + jax.lax.stop_gradient(value - k2)
+ return value + jax.lax.stop_gradient(value - k2)
? train/losses/test_kl.py::test_the_value_is_unbiased
S1 train/step.py: metrics named max are maxima over micro-batches
- {k: v.max() if k.endswith("max") else v.sum() for k, v in metrics.items()}
+ {k: v.sum() for k, v in metrics.items()}
? train/test_step.py::test_packing_padding_and_micro_batches_change_nothing[rl]
S2 train/step.py: each of several updates has its own denominators
- return replace(parts, num_tokens=tokens, num_sequences=sequences)
+ return parts
? train/test_step.py::test_several_updates_are_steps_on_shares_with_the_first_policy_as_proximal
S3 train/step.py: a skipped update does not move the schedule
- schedule(state.step - state.skipped)
+ schedule(state.step)
? train/test_step.py::test_a_non_finite_update_is_skipped_and_counted
S4 train/step.py: an update whose gradient alone is not finite is skipped
- jnp.isfinite(loss) & jnp.isfinite(grad_norm)
+ jnp.isfinite(loss)
? train/test_step.py::test_a_non_finite_update_is_skipped_and_counted
S5 train/step.py: the age of a token
- jnp.where(batch.versions >= 0, version - batch.versions, 0)
+ jnp.where(batch.versions >= 0, version + 1 - batch.versions, 0)
? train/test_step.py::test_the_age_of_a_token_is_counted_from_the_version_that_is_trained
O1 train/optimizer.py: the end of the warm-up
- jnp.where(step < warmup,
+ jnp.where(step <= warmup,
? train/test_optimizer.py::test_only_matrices_decay
O2 train/optimizer.py: the last learning rate
- after = final + (1.0 - final) * shape
+ after = final + shape
? train/test_optimizer.py::test_golden_values_of_the_schedules
O3 train/optimizer.py: Muon and the axes of the output projection
- ("o", "wo", "o_proj")
+ ("wo", "o_proj")
? train/test_optimizer.py::test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adam
M1 model/logprobs.py: padding is not predicted
- (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
+ segment_ids[:, 1:] == segment_ids[:, :-1]
? model/test_logprobs.py::test_no_token_of_the_padding_is_predicted
G1 merge/kernels/task_vectors.py: TIES elects a sign
- [ops.xp.maximum(a * sign, ops.number(0.0)) for a in x]
+ [abs(a) for a in x]
? merge/kernels/test_methods.py::test_ties_by_hand
G2 merge/kernels/sparsify.py: how many elements trimming keeps
- count = max(1, math.floor(density * ops.size))
+ count = max(1, math.ceil(density * ops.size))
? merge/kernels/test_methods.py::test_the_default_equals_mergekit_where_no_difference_is_documented
G3 merge/kernels/sparsify.py: what DARE keeps is rescaled
- 2.0**32 / float(limit) if unbiased else 1.0
+ 1.0
? merge/kernels/test_methods.py::test_rescaling_by_inverse_probability_is_unbiased_and_by_l1_is_exact_in_l1
G4 merge/kernels/spherical.py: slerp between opposites is linear
- straight = abs(c) > parallel
+ straight = c > parallel
? merge/kernels/test_methods.py::test_slerp_between_opposites_is_linear
G5 merge/kernels/selection.py: of equal magnitudes at the threshold the first are kept
- int(equal[quota - 1]) if quota < equal.size else size
+ size
? merge/kernels/test_selection.py::test_the_k_largest_are_kept_and_among_equals_the_first
G6 merge/soups.py: a model that makes the soup no worse is taken
- if score >= best:
+ if score > best:
? merge/test_search.py::test_a_greedy_soup_takes_a_model_on_an_equal_score
G7 merge/kernels/device.py: on a device as many of equal magnitudes are kept
- _count(equal & (index < i)) < quota
+ _count(equal & (index < i)) <= quota
? merge/kernels/test_ops.py
X1 checkpoint.py: a checkpoint refuses a log that is older
- behind = [f"{now[name]} {name}, then {n}" for name, n in saved.items() if now[name] < n]
+ behind = []
? test_checkpoint.py::test_a_step_carries_the_log_and_refuses_an_older_one
X2 run/sampler.py: versions that a resume needs stay
- self.store.collect_garbage(resumable - self.rl.stream.max_staleness)
+ self.store.collect_garbage(resumable)
? run/test_sampler.py::test_the_weights_that_a_resume_samples_with_stay
X3 run/loop.py: a checkpoint holds the loader's step
- loader_state=batches.get_state(),
+ loader_state={"step": step - 1},
? run/test_resume.py::test_asynchronous_runs_recompute_recorded_steps
X4 run/observe/metrics.py: a resumed run keeps the metrics of its checkpoint
- if row["step"] <= start_step]
+ if row["step"] < start_step]
? run/observe/test_metrics.py::test_later_steps_and_torn_lines_are_removed_on_reopening
"""  # noqa: E501


@dataclass(frozen=True)
class Mutation:
    """One text in one file, what takes its place, and the tests that fail then."""

    name: str
    file: str
    meaning: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str  # why no test can fail; empty: one has to


def main(argv: list[str]) -> int:
    """Applies the mutations; the exit code says whether each was noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="ids, with commas")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    options = parser.parse_args(argv)
    wanted = [name for name in options.only.split(",") if name]
    chosen = [m for m in mutations() if not wanted or m.name in wanted]
    if len(chosen) < len(wanted):
        return _refuse(f"--only={options.only} names an unknown mutation; see --list")
    if options.list:
        for m in chosen:
            print(
                f"{m.name:4}{m.file}: {m.meaning}"
                + f" (equivalent: {m.equivalent})" * bool(m.equivalent)
            )
        return 0
    if wrong := misfits(ROOT, chosen):
        return _refuse("\n".join(wrong))
    with copy_of_checkout() as root:
        tests = sorted({test for m in chosen for test in m.tests})
        code, said = run(root, tests)
        if code != PASSED:
            return _refuse(f"{said}\nThe tests named fail without any mutation.")
        return report([(m, *outcome(root, m)) for m in chosen])


def mutations() -> list[Mutation]:
    """The table, read."""
    found: list[Mutation] = []
    lines = TABLE.strip().splitlines()
    heads = [i for i, line in enumerate(lines) if line[0] not in "-+?="]
    for start, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        name, file, meaning = lines[start].split(" ", 2)
        part = {mark: [s[2:] for s in lines[start + 1 : end] if s[0] == mark] for mark in "-+?="}
        (old,), (new,), tests = part["-"], part["+"], tuple(f"tests/{t}" for t in part["?"])
        file = f"agentcpm_jax/{file.removesuffix(':')}"
        found.append(Mutation(name, file, meaning, old, new, tests, " ".join(part["="])))
    return found


def misfits(root: Path, chosen: list[Mutation]) -> list[str]:
    """What of the table is not to be found in the code and the tests."""
    wrong = []
    for m in chosen:
        path = root / m.file
        count = path.read_text().count(m.old) if path.is_file() else -1
        if count < 0:
            wrong.append(f"{m.name}: there is no {m.file}")
        elif count != 1:
            wrong.append(f"{m.name}: {m.file} holds {m.old!r} {count} times, not once")
        for test in m.tests:
            file, _, name = test.partition("::")
            text = (root / file).read_text() if (root / file).is_file() else ""
            if f"def {name.partition('[')[0]}" not in text:
                wrong.append(f"{m.name}: there is no {test}")
    return wrong


@contextmanager
def copy_of_checkout() -> Iterator[Path]:
    """A folder with the files that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        yield Path(folder)


def outcome(root: Path, m: Mutation) -> tuple[bool, float]:
    """(whether a test noticed, seconds)."""
    path, began = root / m.file, time.monotonic()
    source = path.read_text()
    try:
        _write(path, source.replace(m.old, m.new))
        code, said = run(root, m.tests)
    finally:
        _write(path, source)
    if code not in (PASSED, FAILED):
        raise SystemExit(f"{said}\n{m.name}: its tests did not run.")
    seconds = time.monotonic() - began
    became = "killed" if code == FAILED else "SURVIVED"
    print(f"{m.name:4}{became:9}{seconds:5.1f} s  {m.file}: {m.meaning}", flush=True)
    return code == FAILED, seconds


def run(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """(pytest's exit code, what it said at the end); tests that hang have failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, *tests],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE * len(tests))
        return process.returncode, said[-4000:]
    except subprocess.TimeoutExpired:
        return FAILED, "no end"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def report(results: list[tuple[Mutation, bool, float]]) -> int:
    """The closing line, and the exit code."""
    survivors = [m for m, killed, _ in results if not killed]
    unexplained = [m.name for m in survivors if not m.equivalent]
    seconds = sum(s for _, _, s in results)
    print(
        f"{len(results)} mutations in {seconds:.0f} s: {len(results) - len(survivors)} killed, "
        f"{len(survivors) - len(unexplained)} equivalent, "
        f"{len(unexplained)} unnoticed{': ' * bool(unexplained)}{', '.join(unexplained)}"
    )
    return int(bool(unexplained))


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    # A cached module is told by the second it was written in and by its size: both may be equal.
    for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        cached.unlink()


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
