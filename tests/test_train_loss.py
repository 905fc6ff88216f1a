"""The losses against the peers' own functions, and the properties every loss must have."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.rl import compare

from agentcpm_jax.model.logprobs import entropy_from_logits
from agentcpm_jax.train.aggregate import MODES, aggregate
from agentcpm_jax.train.kl import kl_per_token
from agentcpm_jax.train.loss import LossConfig, cross_entropy, grpo, policy_loss
from agentcpm_jax.types import UserError

# ---------------------------------------------------------------------------- reference cases


def agentcpm(params, **change):
    """AgentCPM-Explore's options as ours; its length-normalised cases count what M leaves."""
    by_sequence = "seq-mean-token-sum" if params["skip_length_normalization"] else None
    cfg = LossConfig(
        name=params["loss"],
        clip_low=params["eps"],
        clip_high=params["eps_higher"],
        cap=params["cap"],
        strict=params["strict"],
        decay=params["decay"],
        aggregation=by_sequence or "seq-mean-token-mean",
        log_ratio_clamp=None,
    )
    return dataclasses.replace(cfg, **change)


def tunix(params):
    aggregation = params["agg"].replace("sequence-", "seq-")
    return LossConfig(
        name="grpo",
        clip_low=params["lo"],
        clip_high=params["hi"] - params["lo"],
        cap=None,
        dual_clip=params["c"],
        tis_cap=params["tis_cap"],
        kl_coef=params["beta"],
        kl="k3",
        aggregation=aggregation,
    )


SHAPE = (8, 16)  # every case is padded to one shape: one compilation, and padding is proved inert


def pad(x):
    return jnp.asarray(np.pad(x, [(0, n - k) for n, k in zip(SHAPE, x.shape, strict=True)]))


def loss_and_grad(x, params, cfg):
    rows, slots = x["mask"].shape
    x = {k: pad(v) for k, v in x.items()}
    others = {"old": x.get("old"), "reference": x.get("ref")}
    age = (params["now"] - x["step"]).astype(jnp.float32) if "step" in x else None
    behavior = x.get("beh", x.get("old"))

    def fn(cur):
        arrays = (cur, behavior, x["adv"], x["mask"], None, age)
        return policy_loss(*arrays, None, None, cfg, **others)

    (loss, metrics), grad = jax.value_and_grad(fn, has_aux=True)(x["cur"])
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    out = {"loss": loss, "grad": grad[:rows, :slots]}
    if cfg.tis_cap is not None:
        _, _, seen = grpo(x["cur"], behavior, x["adv"], x["mask"], cfg, old=x["old"])
        out["weights"] = seen["tis_weight"][:rows, :slots]
    return out


def tunix_loss_and_grad(x, params, cfg):
    """Tunix takes one advantage per row; the recorded runs read it at slot 0, where a masked NaN
    had been replaced by 0."""
    per_row = np.nan_to_num(x["adv"][:, :1])
    return loss_and_grad(x | {"adv": np.broadcast_to(per_row, x["adv"].shape)}, params, cfg)


def entropy(x, params, cfg):
    return {"entropy": entropy_from_logits(jnp.asarray(x["logits"]))}


def kept(params):
    return agentcpm(params, denominator="kept")


# id -> (our function, the case's params as our config)
TABLE = {
    "agentcpm_minirl_strict": (loss_and_grad, agentcpm),
    "agentcpm_minirl_loose": (loss_and_grad, agentcpm),
    "agentcpm_minirl_decay": (loss_and_grad, agentcpm),
    "agentcpm_minirl_lennorm": (loss_and_grad, kept),
    "agentcpm_grpo_rowmean": (loss_and_grad, kept),
    "agentcpm_entropy": (entropy, lambda params: None),
    "tunix_grpo_tokenmean": (tunix_loss_and_grad, tunix),
    "tunix_grpo_dual_seqmean": (tunix_loss_and_grad, tunix),
    "tunix_grpo_kl": (tunix_loss_and_grad, tunix),
    "tunix_grpo_tis": (tunix_loss_and_grad, tunix),
}
CASES = [c for c in compare.load() if c.meta["family"] in ("losses", "misc")]


def test_every_reference_loss_is_in_the_table():
    assert {c.id.split("__")[0] for c in CASES} == set(TABLE)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_reference(case):
    fn, config = TABLE[case.id.split("__")[0]]
    assert compare.check(case, lambda x, p: fn(x, p, config(p))) == {}


@pytest.mark.parametrize("case", [c for c in CASES if "lennorm" in c.id], ids=lambda c: c.id)
def test_the_originals_denominator_is_never_the_default(case):
    assert LossConfig().denominator == "all"
    assert compare.check(case, lambda x, p: loss_and_grad(x, p, agentcpm(p))) != {}


# --------------------------------------------------------------------------------- properties

CONFIGS = {
    "minirl": LossConfig(),
    "minirl-loose": LossConfig(strict=False),
    "minirl-decay": LossConfig(strict=False, decay=0.3),
    "minirl-kept": LossConfig(denominator="kept", aggregation="seq-mean-token-mean"),
    "grpo": LossConfig(name="grpo", cap=None, aggregation="token-mean"),
    "grpo-full": LossConfig(name="grpo", dual_clip=3.0, kl_coef=0.1, tis_cap=2.0),
} | {f"minirl-{m}": LossConfig(aggregation=m, norm=7.0) for m in MODES}


APART = [[0], [1], [2], [3], [4]]


def sequences(rng, n=5):
    """`n` ragged sequences: each a dict of 1-D float64 arrays, masks with holes."""
    found = []
    for _ in range(n):
        t = int(rng.integers(3, 9))
        cur = -rng.uniform(0.1, 3.0, t)
        found.append(
            {
                "logprobs": cur,
                "behavior": cur + rng.normal(0, 0.3, t),
                "old": cur + rng.normal(0, 0.2, t),
                "reference": cur + rng.normal(0, 0.2, t),
                "advantages": np.full(t, rng.normal()),
                "mask": np.r_[0.0, 1.0, rng.integers(0, 2, t - 2)],
                "age": rng.integers(0, 4, t).astype(float),
            }
        )
    return found


def lay_out(seqs, bins, fill=0.0, shape=(5, 30)):
    """Sequences packed into rows: bin -> row; `fill` where there is none. Adds segment ids.

    One shape for all tests, so that they share compiled operations.
    """
    rows = {k: np.full(shape, fill) for k in seqs[0]}
    rows["mask"] = np.zeros(shape)
    rows["segment_ids"] = np.zeros(shape, np.int32)
    for b, members in enumerate(bins):
        at = 0
        for k, i in enumerate(members, 1):
            n = len(seqs[i]["mask"])
            for name, values in seqs[i].items():
                rows[name][b, at : at + n] = values
            rows["segment_ids"][b, at : at + n] = k
            at += n
    return rows


def run(rows, cfg, num_tokens=None, num_sequences=None):
    """(loss, gradient as a dense array, metrics) in float64."""
    with jax.enable_x64(True):
        x = {k: jnp.asarray(v) for k, v in rows.items()}
        names = ("behavior", "advantages", "mask", "segment_ids", "age")
        arrays = [x.get(name) for name in names]
        others = {"old": x.get("old"), "reference": x.get("reference")}

        def fn(cur):
            return policy_loss(cur, *arrays, num_tokens, num_sequences, cfg, **others)

        (loss, metrics), grad = jax.value_and_grad(fn, has_aux=True)(x["logprobs"])
        return float(loss), np.asarray(grad), {k: float(v) for k, v in metrics.items()}


def per_sequence(grad, bins, seqs):
    """Dense gradient -> one array per sequence."""
    found = {}
    for b, members in enumerate(bins):
        at = 0
        for i in members:
            n = len(seqs[i]["mask"])
            found[i] = grad[b, at : at + n]
            at += n
    return [found[i] for i in range(len(seqs))]


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_order_and_padding_do_not_matter(name):
    seqs = sequences(np.random.default_rng(0))
    packed = [[3, 0], [], [4, 2, 1]]
    loss, grad, metrics = run(lay_out(seqs, APART), CONFIGS[name])
    loss_p, grad_p, metrics_p = run(lay_out(seqs, packed, fill=np.nan), CONFIGS[name])
    assert loss_p == pytest.approx(loss, rel=1e-10)
    assert metrics_p == pytest.approx(metrics, rel=1e-10)
    for g, g_p in zip(
        per_sequence(grad, APART, seqs), per_sequence(grad_p, packed, seqs), strict=True
    ):
        np.testing.assert_allclose(g_p, g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [k for k in CONFIGS if k != "minirl-kept"])
def test_micro_batches_add_up(name):
    seqs = sequences(np.random.default_rng(1))
    counts = {
        "num_tokens": float(sum(s["mask"].sum() for s in seqs)),
        "num_sequences": float(len(seqs)),
    }
    loss, grad, metrics = run(lay_out(seqs, [[0, 1], [2], [3, 4]]), CONFIGS[name])
    halves = ([[0, 1], [], []], [[], [2], [3, 4]])
    parts = [run(lay_out(seqs, bins), CONFIGS[name], **counts) for bins in halves]
    assert sum(p[0] for p in parts) == pytest.approx(loss, rel=1e-10)
    np.testing.assert_allclose(sum(p[1] for p in parts), grad, rtol=1e-10, atol=1e-12)
    for key, value in metrics.items():
        fold = max if key == "loss/ratio_max" else sum
        assert fold(p[2][key] for p in parts) == pytest.approx(value, rel=1e-10, abs=1e-12), key


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_nan_reaches_neither_value_nor_gradient(name):
    rows = lay_out(sequences(np.random.default_rng(2)), [[0, 1], [2, 3], [4]])
    clean_loss, clean_grad, _ = run(rows, CONFIGS[name])
    for key in ("logprobs", "behavior", "old", "reference", "advantages", "age"):
        rows[key] = np.where(rows["mask"] > 0, rows[key], np.nan)
    loss, grad, metrics = run(rows, CONFIGS[name])
    assert loss == clean_loss and np.isfinite(list(metrics.values())).all()
    np.testing.assert_array_equal(grad, clean_grad)
    assert (grad[rows["mask"] == 0] == 0).all()


def test_padding_is_no_segment_even_if_the_mask_says_so():
    rows = lay_out(sequences(np.random.default_rng(3)), APART)
    expected = run(rows, LossConfig())
    wrong = rows | {"mask": np.where(rows["segment_ids"] == 0, 1.0, rows["mask"])}
    assert run(wrong, LossConfig())[0] == expected[0]


@pytest.mark.parametrize("name", ["minirl", "grpo"])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_positive_advantage_raises_the_log_probability(name, advantage):
    rows = lay_out(sequences(np.random.default_rng(4)), APART)
    rows |= {"advantages": np.full_like(rows["mask"], advantage), "behavior": rows["logprobs"]}
    _, grad, _ = run(rows | {"old": rows["logprobs"]}, CONFIGS[name])
    assert (np.sign(-grad) == np.sign(advantage) * (rows["mask"] > 0)).all()


@pytest.mark.parametrize("name", ["minirl", "minirl-loose", "minirl-decay", "grpo", "grpo-full"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name):
    rows = lay_out(sequences(np.random.default_rng(5)), APART)
    rows |= dict.fromkeys(("behavior", "old", "reference"), rows["logprobs"])
    cfg = dataclasses.replace(CONFIGS[name], aggregation="seq-mean-token-sum")
    _, grad, metrics = run(rows, cfg)
    np.testing.assert_allclose(grad, -rows["advantages"] * rows["mask"] / 5, rtol=1e-12)
    assert metrics["loss/ratio_max"] == 1.0 and metrics["loss/kl_behavior_k3"] == 0.0


def one_row(ratios, advantages, age=0.0):
    """One sequence with these ratios to the behaviour policy."""
    logprobs = np.full(len(ratios), -1.0)
    row = {
        "logprobs": logprobs,
        "behavior": logprobs - np.log(ratios),
        "advantages": np.asarray(advantages, np.float64),
        "mask": np.ones(len(ratios)),
        "age": np.broadcast_to(np.asarray(age, np.float64), logprobs.shape),
    }
    return lay_out([row], [[0]])


def test_minirl_bounds_cut_only_on_the_side_the_gradient_pushes():
    rows = one_row([1.29, 1.31, 0.81, 0.79, 1.31, 0.79], [1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    _, grad, metrics = run(rows, LossConfig())
    ratio = np.exp(rows["logprobs"] - rows["behavior"])[0, :6]
    within = np.array([1, 0, 1, 0, 1, 1])
    expected = -ratio * rows["advantages"][0, :6] * within
    np.testing.assert_allclose(grad[0, :6], expected, rtol=1e-12)
    assert metrics["loss/bound_fraction"] == pytest.approx(2 / 6)
    assert metrics["loss/clip_fraction"] == pytest.approx(2 / 6)


def test_the_band_tightens_with_age():
    rows = one_row([1.5, 1.5, 1.5], [1.0, 1.0, 1.0], age=[0.0, 5.0, 50.0])
    _, grad, _ = run(rows, LossConfig(strict=False, decay=0.1))
    # U = 1 + 0.3 * 4 * exp(-0.1 age): 2.2, 1.73, 1.01
    assert (grad[0, :3] != 0).tolist() == [True, True, False]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_bounds_never_inflate_the_tokens_they_leave(mode):
    within = one_row([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    beyond = one_row([1.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0])
    _, before, _ = run(within, LossConfig(aggregation=mode))
    _, after, _ = run(beyond, LossConfig(aggregation=mode))
    assert after[0, :4].tolist() == [before[0, 0], 0.0, 0.0, 0.0]
    _, inflated, _ = run(beyond, LossConfig(aggregation=mode, denominator="kept"))
    assert inflated[0, 0] == 4 * before[0, 0]


@pytest.mark.parametrize("name", ["minirl", "grpo", "grpo-full"])
def test_absurd_log_ratios_stay_finite(name):
    rows = one_row([1.0, 1.0], [-1.0, 1.0])
    rows["behavior"][0, :2] = [-2000.0, 2000.0]
    loss, grad, metrics = run(
        rows | {"old": rows["logprobs"], "reference": rows["behavior"]},
        dataclasses.replace(CONFIGS[name], kl_coef=0.0),
    )
    assert np.isfinite([loss, *grad[0], *metrics.values()]).all()


def test_five_aggregation_modes_by_hand():
    values = jnp.asarray([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    mask = jnp.asarray([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    segments = jnp.asarray([[1, 1, 2, 2], [1, 1, 2, 2]])  # the last has no trained token
    expected = {
        "token-sum": 39.0,
        "token-mean": 39.0 / 4,
        "seq-mean-token-sum": (3 + 4 + 32) / 3,
        "seq-mean-token-mean": (1.5 + 4 + 32) / 3,
        "seq-mean-token-sum-norm": 39.0 / 3 / 10,
    }
    got = {m: float(aggregate(values, mask, segments, m, norm=10.0)) for m in MODES}
    assert got == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_is_a_weighted_mean_and_ignores_nan():
    logprobs = jnp.asarray([[jnp.nan, -1.0, -3.0], [-5.0, jnp.nan, jnp.nan]])
    mask = jnp.asarray([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    weights = jnp.asarray([[jnp.nan, 2.0, 1.0], [0.5, jnp.nan, jnp.nan]])
    assert float(cross_entropy(logprobs, mask)) == 3.0
    assert float(cross_entropy(logprobs, mask, weights, num_tokens=15.0)) == 0.5
    grad = jax.grad(cross_entropy)(logprobs, mask, weights)
    np.testing.assert_allclose(grad, -np.array([[0, 2, 1], [0.5, 0, 0]]) / 3, rtol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimators_are_unbiased(kind):
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    each = kl_per_token(jnp.log(p), jnp.log(q), kind)
    exact = float((p * np.log(p / q)).sum())
    assert float((p * np.asarray(each)).sum()) == pytest.approx(exact, rel=1e-5)


def test_kl_k3_is_never_negative_and_the_gradient_of_k2_is_right():
    logits, target = jnp.asarray([0.3, -0.2, 1.0]), jnp.asarray([-0.5, 0.1, 0.4])
    q = jax.nn.log_softmax(target)
    assert (np.asarray(kl_per_token(jax.nn.log_softmax(logits), q, "k3")) >= 0).all()

    def exact(x):
        p = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(p) * (p - q))

    def sampled(x):  # expectation of k2's gradient over samples of the (frozen) policy
        p = jax.nn.log_softmax(x)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(p)) * kl_per_token(p, q, "k2"))

    np.testing.assert_allclose(jax.grad(sampled)(logits), jax.grad(exact)(logits), atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"name": "ppo2"}, {"aggregation": "mean"}, {"denominator": "some"}, {"kl": "k9"}]
)
def test_unknown_options_name_value_and_fix(change):
    with pytest.raises(UserError, match=f"{next(iter(change.values()))}.*use one of"):
        LossConfig(**change)


def test_missing_arrays_are_errors_never_ratio_one():
    rows = one_row([1.0], [1.0])
    with pytest.raises(UserError, match="reference"):
        run(rows, LossConfig(kl_coef=0.1))
    with pytest.raises(UserError, match="old"):
        run(rows, LossConfig(name="grpo", tis_cap=2.0))
    with pytest.raises(UserError, match="norm"):
        run(rows, LossConfig(aggregation="seq-mean-token-sum-norm"))
