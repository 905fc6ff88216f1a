"""Every reference case of this folder by its id up to `__`: which function of ours computes it, or
why it is not offered. `TABLE[prefix].fn(inputs, params) -> outputs` works on any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.golden.rl import estimates as e
from tests.golden.rl import losses as a


@dataclass(frozen=True)
class Offered:
    """`ours` names the function and options that `fn` calls."""

    ours: str
    fn: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class NotOffered:
    reason: str


POLICY = "loss.policy_loss"
NO_CRITIC = NotOffered("needs a value network; agents here are trained without a critic")
NOT_EXACT = NotOffered(
    "divides by the mean weight of a batch: the result would depend on micro-batches"
)

TABLE: dict[str, Offered | NotOffered] = {
    # losses
    "verl_ppo_dualclip_tokenmean": Offered(f"{POLICY}: ppo", a.loss(a.verl("ppo"))),
    "verl_dapo_cliphigher": Offered(f"{POLICY}: dapo (dual clip on)", a.loss(a.verl("ppo"))),
    "verl_ppo_seqmean_tokenmean": Offered(f"{POLICY}: ppo", a.loss(a.verl("ppo"))),
    "verl_drgrpo_norm": Offered(f"{POLICY}: dr_grpo (dual clip on)", a.loss(a.verl("ppo"))),
    "verl_ppo_token_tis": Offered(
        f"{POLICY}: ppo, recompute, token_tis", a.loss(a.verl("ppo"), behavior="beh")
    ),
    "verl_gspo": Offered(f"{POLICY}: gspo", a.loss(a.verl("gspo"))),
    "verl_cispo": Offered(f"{POLICY}: cispo", a.loss(a.verl("cispo"))),
    "verl_cispo_twosided": Offered(f"{POLICY}: cispo", a.loss(a.verl("cispo"))),
    "verl_dppo_tv": Offered(f"{POLICY}: dppo_tv", a.loss(a.verl("dppo_tv"))),
    "verl_dppo_kl": Offered(f"{POLICY}: dppo_kl", a.loss(a.verl("dppo_kl"))),
    "verl_bypass_reinforce": Offered(
        f"{POLICY}: reinforce, token_tis, mean_k3, kept", a.loss(a.verl_bypass, behavior="beh")
    ),
    "areal_ppo_dual": Offered(f"{POLICY}: ppo", a.loss(a.areal)),
    "areal_decoupled_tis": Offered(
        f"{POLICY}: decoupled_ppo, token_tis", a.loss(a.areal, behavior="beh")
    ),
    "areal_decoupled_mask": Offered(
        f"{POLICY}: decoupled_ppo, icepop", a.loss(a.areal, behavior="beh")
    ),
    "areal_decoupled_geo": Offered(
        f"{POLICY}: decoupled_ppo, geometric_icepop", a.loss(a.areal, behavior="beh")
    ),
    "areal_decoupled_k3seq": Offered(
        f"{POLICY}: decoupled_ppo, token_tis, mean_k3_back", a.loss(a.areal, behavior="beh")
    ),
    "areal_gspo": Offered(f"{POLICY}: gspo", a.loss(a.areal)),
    "skyrl_ppo_regular": Offered(f"{POLICY}: ppo", a.loss(a.skyrl("ppo"))),
    "skyrl_ppo_dual_seqmean": Offered(
        f"{POLICY}: ppo", a.loss(a.skyrl("ppo"), all_rows=a.by_mean_of_rows)
    ),
    "skyrl_ppo_seq_tis": Offered(
        f"{POLICY}: ppo, recompute, sequence_tis", a.loss(a.skyrl("ppo"), behavior="beh")
    ),
    "skyrl_cispo_rollout_anchor": Offered(
        f"{POLICY}: cispo", a.loss(a.skyrl("cispo"), behavior="beh")
    ),
    "skyrl_rollout_is": Offered(
        f"{POLICY}: cispo, token_mask", a.loss(a.skyrl_rollout_is, behavior="beh")
    ),
    "skyrl_dppo_tv": Offered(
        f"{POLICY}: dppo_tv, importance",
        a.loss(a.skyrl("dppo_tv", objective="importance"), behavior="beh"),
    ),
    "skyrl_gspo": Offered(f"{POLICY}: gspo", a.loss(a.skyrl("gspo"), all_rows=a.by_mean_of_rows)),
    "tunix_grpo_tokenmean": Offered(f"{POLICY}: ppo", a.tunix_rows(a.loss(a.tunix))),
    "tunix_grpo_dual_seqmean": Offered(f"{POLICY}: ppo", a.tunix_rows(a.loss(a.tunix))),
    "tunix_grpo_kl": Offered(f"{POLICY}: ppo, kl k3", a.tunix_rows(a.loss(a.tunix))),
    "tunix_grpo_tis": Offered(
        f"{POLICY}: ppo, recompute, token_tis", a.tunix_rows(a.loss(a.tunix, behavior="beh"))
    ),
    "tunix_gspo_token": Offered(f"{POLICY}: gspo", a.tunix_rows(a.loss(a.tunix))),
    "slime_ppo": Offered(f"{POLICY}: ppo", a.loss(a.slime("ppo"))),
    "slime_ppo_dual": Offered(f"{POLICY}: ppo", a.loss(a.slime("ppo"))),
    "slime_cispo": Offered(f"{POLICY}: cispo", a.loss(a.slime("cispo"))),
    "skyrljax_ppo": Offered(
        f"{POLICY}: ppo", a.loss(a.skyrl_jax("ppo", dual_clip=0.0), behavior="beh")
    ),
    "skyrljax_cispo": Offered(f"{POLICY}: cispo", a.loss(a.skyrl_jax("cispo"), behavior="beh")),
    "skyrljax_is": Offered(
        f"{POLICY}: importance",
        a.loss(a.skyrl_jax("cispo", objective="importance"), behavior="beh"),
    ),
    "prime_dppo_kl": Offered(
        f"{POLICY}: dppo_tv, importance, kl k2 to the sampler",
        a.loss(a.prime, behavior="beh", reference="beh"),
    ),
    "prime_ipo": NotOffered("a symmetric region that also drops tokens moving back; use dppo_tv"),
    "agentcpm_minirl_strict": Offered(f"{POLICY}: minirl", a.loss(a.agentcpm, behavior="beh")),
    "agentcpm_minirl_loose": Offered(
        f"{POLICY}: minirl, widen 4", a.loss(a.agentcpm, behavior="beh")
    ),
    "agentcpm_minirl_decay": Offered(
        f"{POLICY}: minirl, widen 4, decay", a.loss(a.agentcpm, behavior="beh")
    ),
    "agentcpm_minirl_lennorm": Offered(
        f"{POLICY}: minirl, kept", a.loss(a.agentcpm, behavior="beh")
    ),
    "agentcpm_grpo_rowmean": Offered(
        f"{POLICY}: ppo, region ratio, kept", a.loss(a.agentcpm, behavior="beh")
    ),
    # advantages
    "verl_grpo_std": Offered("advantages.estimate: grpo", e.advantages("grpo", "raw")),
    "verl_grpo_nostd": Offered(
        "advantages.estimate: grpo_no_std", e.advantages("grpo_no_std", "raw")
    ),
    "verl_rloo": Offered(
        "advantages.estimate: leave_one_out", e.advantages("leave_one_out", "raw")
    ),
    "verl_opo": NotOffered("length-weighted baseline: not among the methods offered"),
    "verl_rfpp": Offered(
        "advantages.estimate: raw; loss.normalize_advantages", e.advantages("raw", whiten=True)
    ),
    "verl_rfpp_baseline": Offered(
        "advantages.estimate: grpo_no_std; loss.normalize_advantages",
        e.advantages("grpo_no_std", "raw", whiten=True),
    ),
    "verl_gae": NO_CRITIC,
    "tunix_gae": NO_CRITIC,
    "areal_gae": NO_CRITIC,
    "skyrl_rloo": Offered("advantages.estimate: leave_one_out", e.advantages("leave_one_out")),
    "skyrl_maxrl": NotOffered("division by the mean reward: not among the methods offered"),
    "skyrl_rfpp_singleturn": Offered(
        "advantages.estimate: raw; loss.normalize_advantages", e.advantages("raw", whiten=True)
    ),
    "tunix_grpo": Offered("advantages.estimate: grpo", e.advantages("grpo")),
    "tunix_drgrpo": Offered("advantages.estimate: grpo_no_std", e.advantages("grpo_no_std")),
    "tunix_rloo": Offered("advantages.estimate: leave_one_out", e.advantages("leave_one_out")),
    "areal_norm_group_std": Offered("advantages.grpo: eps", e.areal_norm),
    "areal_norm_loo": Offered("advantages.estimate: leave_one_out", e.areal_norm),
    "areal_norm_group_mean_batch_std": NotOffered(
        "a deviation over samples of the batch; REINFORCE++-baseline here is over its tokens"
    ),
    "prime_grpo": Offered("advantages.estimate: grpo_no_std", e.advantages("grpo_no_std")),
    "prime_maxrl": NotOffered("division by the mean reward: not among the methods offered"),
    # off-policy
    "verl_tis_token": Offered("correction.correct: token_tis", e.rules(e.verl_weights)),
    "verl_tis_seq": Offered("correction.correct: sequence_tis", e.rules(e.verl_weights)),
    "verl_tis_token_norm": NOT_EXACT,
    "verl_tis_seq_norm": NOT_EXACT,
    "verl_icepop": Offered("correction.correct: icepop", e.rules(e.verl_weights)),
    "verl_icepop_seq": Offered("correction.correct: sequence_icepop", e.rules(e.verl_weights)),
    "skyrl_tis_token": Offered("correction.correct: token_tis", e.rules(e.skyrl_rules)),
    "skyrl_tis_seq": Offered("correction.correct: sequence_tis", e.rules(e.skyrl_rules)),
    "skyrl_mask_geometric": Offered("correction.correct: geometric", e.rules(e.skyrl_rules)),
    "skyrl_mask_product": Offered("correction.correct: mis", e.rules(e.skyrl_rules)),
    "skyrl_veto": Offered("correction.correct: veto", e.rules(e.skyrl_rules)),
    "skyrl_veto_highonly": Offered("correction.correct: veto", e.rules(e.skyrl_rules)),
    "skyrl_token_mask": Offered("correction.correct: token_mask", e.rules(e.skyrl_rules)),
    "slime_tis": Offered(
        "correction.correct: token_tis",
        e.rules(lambda p: [e.Rule("ratio", "token", "truncate", p["lower"], p["upper"])]),
    ),
    "slime_icepop": Offered(
        "correction.correct: icepop",
        e.rules(lambda p: [e.Rule("ratio", "token", "zero", p["lower"], p["upper"])]),
    ),
    "slime_opsm": NotOffered("a mask of sequences by advantage and drift: not among the methods"),
    "areal_prox_loglinear": Offered("correction.log_linear", e.prox_loglinear),
    "areal_prox_linear": NotOffered("interpolates probabilities; the log-linear form is offered"),
    # KL
    "verl_kl_abs": NotOffered("|x| estimates no divergence"),
    "slime_kl_k3_is": Offered("kl.kl_per_token: k3, kl_ratio", e.kl("k3", ratio=True)),
    # entropy, log-probabilities, reward shaping
    "verl_entropy": Offered("logprobs.label_logprobs, aggregate.aggregate", e.entropy),
    "tunix_entropy": Offered("logprobs.label_logprobs", e.entropy),
    "agentcpm_entropy": Offered("logprobs.label_logprobs", e.entropy),
    "tunix_selective_logsoftmax": Offered("logprobs.logprobs_from_logits", e.token_logps),
    "areal_overlong": Offered("advantages.soft_overlong", e.overlong),
    "verl_overlong": Offered("advantages.soft_overlong", e.overlong),
}

for peer, kinds, exponent, value in (
    ("verl", ("k1", "k2", "k3", "k1+", "k3+", "low_var_kl"), 20.0, 10.0),
    ("slime", ("k1", "k2", "k3", "low_var_kl"), 0.0, 10.0),
    ("areal", ("k1", "k2", "k3"), 0.0, 10.0),
    ("tunix", ("kl", "mse_kl", "low_var_kl"), 0.0, 0.0),
):
    for name in kinds:
        kind = {"low_var_kl": "k3", "kl": "k1", "mse_kl": "k2"}.get(name, name)
        clamped = {
            "verl": "3" in kind or name == "low_var_kl",
            "slime": name == "low_var_kl",
            "areal": True,
            "tunix": False,
        }[peer]
        TABLE[f"{peer}_kl_{name}"] = Offered(
            f"kl.kl_per_token: {kind}", e.kl(kind, exponent, value if clamped else 0.0)
        )
for mode in ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"):
    TABLE[f"verl_agg_{mode}"] = Offered(f"aggregate.aggregate: {mode}", e.aggregation)
TABLE["verl_agg_seq-mean-token-sum-norm"] = Offered("aggregate.aggregate", e.aggregation)
for mode in (
    "token-mean",
    "sequence-mean-token-mean",
    "sequence-mean-token-scale",
    "seq-mean-token-sum",
    "sequence-mean-token-sum-norm",
):
    for kind in ("agg", "packed", "empty"):
        TABLE[f"tunix_{kind}_{mode}"] = Offered("aggregate.aggregate", e.aggregation)
for option in (
    *(f"{level}_{metric}" for level in ("token", "seq_sum", "seq_mean", "seq_max")
      for metric in ("k1", "k2", "k3")),
    "token_k1+seq_mean_k3",
):  # fmt: skip
    TABLE[f"verl_rs_{option}"] = Offered("correction.correct: mask", e.rules(e.verl_masks))
for level in ("token", "sequence"):
    for metric in ("ratio", "kl_k1", "kl_k2", "kl_k3"):
        for agg in ("mean", "sum", "max"):
            for action in ("mask", "clamp"):
                TABLE[f"areal_rs_{level}_{metric}_{agg}_{action}"] = Offered(
                    "correction.correct", e.areal_rules
                )
