"""The published methods by name: objective, constants, aggregation, and which advantages they take.

`LossConfig(name="dapo")` has DAPO's constants; each can be overridden. Its estimator of advantages
is that of the table too, unless `advantages.estimator` names one (`rewards.advantages.for_loss`).
DAPO's dynamic sampling and overlong filter are the denoising filters `zero_variance` and `extreme`,
its soft overlong punishment is `advantages.overlong_*`.

name                   source
minirl                 AgentCPM-Explore's form of MiniRL (one ratio, to the engine; strict bounds)
minirl_paper           Zheng et al. 2025, arXiv 2512.01374 (bounds on pi/pi_old) [1]
reinforce              Williams 1992, with truncated importance weights [2]
rloo                   Ahmadian et al. 2024, arXiv 2402.14740 [2]
reinforce_pp           Hu et al. 2025, arXiv 2501.03262: batch-normalised returns, clipped
reinforce_pp_baseline  the same, on group-centred rewards
ppo                    Schulman et al. 2017 with the dual clip of Ye et al. 2020, arXiv 1912.09729
decoupled_ppo          Hilton et al. 2022; Fu et al. 2025 (AReaL), arXiv 2505.24298 [3]
grpo                   Shao et al. 2024, arXiv 2402.03300
dr_grpo                Liu et al. 2025, arXiv 2503.20783 [4]
dapo                   Yu et al. 2025, arXiv 2503.14476
gspo                   Zheng et al. 2025, arXiv 2507.18071
cispo                  MiniMax 2025, arXiv 2506.13585 [5]
dppo_tv, dppo_kl       arXiv 2602.04879, thresholds as in prime-rl and verl

[1] A parity form, its numbers unverified: the paper's bounds and its truncation of pi/mu were not
    read at the source. The bounds are those of "minirl", the truncation is at 5.
[2] On-policy in the papers; asynchronous samples need the weights (token_tis at 2).
[3] Weights pi_old/mu truncated at 5, AReaL's cap.
[4] norm = 3000, the paper's generation budget; it only scales the learning rate. Set your own.
[5] The paper gives no upper bound; 0.28 as in the frameworks that offer it. No lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from agentcpm_jax.ranges import check_choice, check_least
from agentcpm_jax.types import UserError

MODES = (  # of aggregation
    "token-sum",
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
KINDS = ("k1", "k2", "k3", "k1+", "k3+")  # of KL estimates


class Rule(NamedTuple):
    """What is measured and what follows; see the table in `correction`."""

    metric: str  # ratio | k2 | k3 | k3_back
    level: str  # token, or over the sequence: sum | mean | max | every
    action: str  # truncate | zero | mask
    low: float
    high: float


RULES: dict[str, Rule] = {
    "token_tis": Rule("ratio", "token", "truncate", 0.0, 2.0),
    "sequence_tis": Rule("ratio", "sum", "truncate", 0.0, 2.0),
    "geometric_tis": Rule("ratio", "mean", "truncate", 0.0, 2.0),
    "icepop": Rule("ratio", "token", "zero", 0.5, 5.0),
    "sequence_icepop": Rule("ratio", "sum", "zero", 0.5, 2.0),
    "geometric_icepop": Rule("ratio", "mean", "zero", 0.5, 2.0),
    "token_mask": Rule("ratio", "token", "mask", 0.5, 2.0),
    "mis": Rule("ratio", "sum", "mask", 0.5, 2.0),
    "geometric": Rule("ratio", "mean", "mask", 0.99, 1.01),
    "veto": Rule("ratio", "every", "mask", 1e-4, 1e4),
} | {
    f"{level}_{metric}": Rule(metric, level, "mask", 0.0, high)
    for level in ("token", "sum", "mean", "max")
    for metric, high in (("k2", 0.1), ("k3", 0.01), ("k3_back", 0.01))
}


@dataclass(frozen=True)
class Correction:
    """One rule of the table in `correction`, by name, and its bounds (None: those of the table)."""

    name: str
    low: float | None = None
    high: float | None = None  # 0: unbounded

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise UserError(f"unknown correction {self.name!r}; use one of {', '.join(RULES)}")

    @property
    def rule(self) -> Rule:
        """The rule with this correction's bounds."""
        rule = RULES[self.name]
        low = rule.low if self.low is None else self.low
        high = rule.high if self.high is None else self.high or float("inf")
        return rule._replace(low=low, high=high)

    @property
    def weights(self) -> bool:
        """Whether it weights tokens (the others keep or drop them)."""
        return self.rule.action != "mask"


@dataclass(frozen=True)
class Method:
    """A method with every constant written out; each field but the first two as in `LossConfig`."""

    estimator: str = "grpo"  # of the advantages: see `rewards.advantages`
    normalize: bool = False  # advantages have mean 0 and variance 1 over the tokens of a batch
    objective: str = "clip"
    eps_low: float = 0.2
    eps_high: float = 0.2
    region: str = "none"
    widen: float = 1.0
    decay: float = 0.0
    dual_clip: float = 0.0
    ratio_cap: float = 0.0
    proximal: str = "bypass"
    corrections: tuple[Correction, ...] = ()
    kl_coef: float = 0.0
    kl: str = "k3"
    kl_ratio: bool = False
    kl_clamp: float = 10.0
    aggregation: str = "token-mean"
    norm: float = 0.0
    denominator: str = "all"
    log_ratio_clamp: float = 20.0
    updates: int = 1


_MINIRL = Method(
    estimator="leave_one_out",
    objective="minirl",
    region="ratio",
    eps_high=0.3,
    aggregation="seq-mean-token-sum",
)
_REINFORCE = Method(
    estimator="grpo_no_std",
    objective="reinforce",
    corrections=(Correction("token_tis"),),
    aggregation="seq-mean-token-sum",
)

METHODS: dict[str, Method] = {
    "minirl": _MINIRL,
    "minirl_paper": replace(_MINIRL, estimator="grpo_no_std", proximal="recompute", ratio_cap=5.0),
    "reinforce": _REINFORCE,
    "rloo": replace(_REINFORCE, estimator="leave_one_out"),
    "reinforce_pp": Method(estimator="raw", normalize=True),
    "reinforce_pp_baseline": Method(estimator="grpo_no_std", normalize=True),
    "ppo": Method(dual_clip=3.0),
    "decoupled_ppo": Method(proximal="recompute", corrections=(Correction("token_tis", high=5.0),)),
    "grpo": Method(kl_coef=0.04, aggregation="seq-mean-token-mean"),
    "dr_grpo": Method(estimator="grpo_no_std", aggregation="seq-mean-token-sum-norm", norm=3000.0),
    "dapo": Method(eps_high=0.28),
    "gspo": Method(
        objective="gspo", eps_low=3e-4, eps_high=4e-4, aggregation="seq-mean-token-mean"
    ),
    "cispo": Method(objective="cispo", eps_low=1.0, eps_high=0.28),
    "dppo_tv": Method(objective="dppo", ratio_cap=20.0, region="tv"),
    "dppo_kl": Method(objective="dppo", ratio_cap=20.0, region="kl", eps_low=0.05, eps_high=0.05),
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "name": tuple(METHODS),
    "denominator": ("all", "kept"),
    "objective": ("minirl", "reinforce", "importance", "clip", "gspo", "cispo", "dppo"),
    "region": ("none", "ratio", "tv", "kl"),
    "proximal": ("bypass", "recompute", "loglinear"),
    "kl": KINDS,
    "aggregation": MODES,
}


@dataclass(frozen=True)
class LossConfig:
    """Which method. None: the value that the method has; a constant of 0 is switched off."""

    name: str = "minirl"
    objective: str | None = None  # minirl | reinforce | importance | clip | gspo | cispo | dppo
    eps_low: float | None = None  # the band of the ratio is [1 - eps_low, 1 + eps_high]
    eps_high: float | None = None
    region: str | None = None  # what leaves the loss: none | ratio | tv | kl (see `objectives`)
    widen: float = 1.0  # the region's band is this much wider than the clip's
    decay: float = 0.0  # per version of age: the region shrinks by exp(-decay age)
    dual_clip: float | None = None  # ceiling of the ratio where A < 0, e.g. 3
    ratio_cap: float | None = None  # of the importance weight of minirl and dppo
    proximal: str | None = None  # pi_old: bypass (the sampler) | recompute | loglinear
    corrections: tuple[Correction, ...] | None = None  # (): none at all
    kl_coef: float | None = None  # of the KL to the stage's first parameters
    kl: str | None = None  # k1 | k2 | k3 | k1+ | k3+
    kl_ratio: bool = False  # weight each token's KL by sg(pi/pi_old)
    kl_clamp: float = 10.0  # largest value of k3
    aggregation: str | None = None  # how tokens add up to a loss: see `aggregate`
    norm: float | None = None  # C of "seq-mean-token-sum-norm"
    denominator: str = "all"  # "kept": only what regions and masks leave, of each micro-batch
    log_ratio_clamp: float = 20.0
    updates: int = 1  # optimizer updates per batch, each on its share of the rows

    def __post_init__(self) -> None:
        check_choice(self, "loss", _CHOICES)
        constants = ("eps_low", "eps_high", "dual_clip", "ratio_cap", "kl_coef", "norm")
        check_least(self, "loss", {"updates": 1} | dict.fromkeys(constants, 0))
        _check_together(resolve(self))


def resolve(cfg: LossConfig | Method) -> Method:
    """The method that a configuration names, with what the configuration gives in its place."""
    if isinstance(cfg, Method):
        return cfg
    given = {key: value for key, value in vars(cfg).items() if value is not None and key != "name"}
    return replace(METHODS[cfg.name], **given)


def _check_together(method: Method) -> None:
    if method.aggregation == "seq-mean-token-sum-norm" and not method.norm:
        raise UserError(f"aggregation {method.aggregation!r} needs a length; set norm, e.g. 1024")
    weights = [c.name for c in method.corrections if c.weights]
    twice = method.objective == "minirl" or (
        method.proximal == "bypass" and method.objective != "reinforce"
    )
    if weights and twice:
        raise UserError(
            f"correction {weights[0]!r} weights by pi_old/mu, but {method.objective!r} with "
            f"proximal={method.proximal!r} has mu in its ratio already: it would count twice; "
            "use a mask (geometric, mis, token_mask), or 'clip' with proximal='recompute'"
        )
