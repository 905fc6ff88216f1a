"""The published methods by name: objective, constants, what they are aggregated with.

`LossConfig(name="dapo")` has DAPO's constants; each can be overridden. What a method wants besides
its loss: the advantages follow the loss's name too (`rewards.advantages.for_loss`); DAPO's dynamic
sampling and overlong filter are the denoising filters `zero_variance` and `extreme`, its soft
overlong punishment is `advantages.overlong_*`.

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
from typing import Any, NamedTuple

from agentcpm_jax.types import UserError

MODES = (  # of aggregation
    "token-sum",
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
KINDS = ("k1", "k2", "k3", "k1+", "k3+")  # of KL estimates
OWN = -1.0  # of a constant: the method's own


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
    """One rule of the table in `correction`, by name; "none" stands for no correction at all."""

    name: str
    low: float = -1.0  # -1: the rule's own
    high: float = -1.0  # -1: the rule's own; 0: unbounded

    def __post_init__(self) -> None:
        if self.name != "none" and self.name not in RULES:
            raise UserError(
                f"unknown correction {self.name!r}; use one of none, {', '.join(RULES)}"
            )

    @property
    def rule(self) -> Rule:
        """The rule with this correction's bounds."""
        rule = RULES[self.name]
        low = rule.low if self.low == -1.0 else self.low
        high = rule.high if self.high == -1.0 else self.high or float("inf")
        return rule._replace(low=low, high=high)

    @property
    def weights(self) -> bool:
        """Whether it weights tokens (the others keep or drop them)."""
        return self.name != "none" and self.rule.action != "mask"


#: What a method has unless it says otherwise.
_SHARED: dict[str, Any] = {
    "objective": "clip",
    "eps_low": 0.2,
    "eps_high": 0.2,
    "region": "none",
    "dual_clip": 0.0,
    "ratio_cap": 0.0,
    "proximal": "bypass",
    "corrections": (),
    "normalize": "none",
    "kl_coef": 0.0,
    "kl": "k3",
    "aggregation": "token-mean",
    "norm": 0.0,
}
_MINIRL = {
    "objective": "minirl",
    "region": "ratio",
    "eps_high": 0.3,
    "aggregation": "seq-mean-token-sum",
}
_REINFORCE = {
    "objective": "reinforce",
    "corrections": (Correction("token_tis"),),
    "aggregation": "seq-mean-token-sum",
}
_DPPO = {"objective": "dppo", "ratio_cap": 20.0}

METHODS: dict[str, dict[str, Any]] = {
    name: _SHARED | own
    for name, own in {
        "minirl": _MINIRL,
        "minirl_paper": _MINIRL | {"proximal": "recompute", "ratio_cap": 5.0},
        "reinforce": _REINFORCE,
        "rloo": _REINFORCE,
        "reinforce_pp": {"normalize": "batch"},
        "reinforce_pp_baseline": {"normalize": "batch"},
        "ppo": {"dual_clip": 3.0},
        "decoupled_ppo": {
            "proximal": "recompute",
            "corrections": (Correction("token_tis", high=5.0),),
        },
        "grpo": {"kl_coef": 0.04, "aggregation": "seq-mean-token-mean"},
        "dr_grpo": {"aggregation": "seq-mean-token-sum-norm", "norm": 3000.0},
        "dapo": {"eps_high": 0.28},
        "gspo": {
            "objective": "gspo",
            "eps_low": 3e-4,
            "eps_high": 4e-4,
            "aggregation": "seq-mean-token-mean",
        },
        "cispo": {"objective": "cispo", "eps_low": 1.0, "eps_high": 0.28},
        "dppo_tv": _DPPO | {"region": "tv"},
        "dppo_kl": _DPPO | {"region": "kl", "eps_low": 0.05, "eps_high": 0.05},
    }.items()
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("minirl", "reinforce", "importance", "clip", "gspo", "cispo", "dppo"),
    "region": ("none", "ratio", "tv", "kl"),
    "proximal": ("bypass", "recompute", "loglinear"),
    "normalize": ("none", "batch"),
    "kl": KINDS,
    "aggregation": MODES,
}


@dataclass(frozen=True)
class LossConfig:
    """Which method; -1, "" and () stand for the method's own value, 0 switches a constant off."""

    name: str = "minirl"
    objective: str = ""  # minirl | reinforce | importance | clip | gspo | cispo | dppo
    eps_low: float = OWN  # the band of the ratio is [1 - eps_low, 1 + eps_high]
    eps_high: float = OWN
    region: str = ""  # what leaves the loss: none | ratio | tv | kl (see `objectives`)
    widen: float = 1.0  # the region's band is this much wider than the clip's
    decay: float = 0.0  # per version of age: the region shrinks by exp(-decay age)
    dual_clip: float = OWN  # ceiling of the ratio where A < 0, e.g. 3
    ratio_cap: float = OWN  # of the importance weight of minirl and dppo
    proximal: str = ""  # pi_old: bypass (the sampler) | recompute | loglinear
    corrections: tuple[Correction, ...] = ()  # (Correction("none"),) switches the method's own off
    normalize: str = ""  # of the advantages: none | batch (mean 0, variance 1 over its tokens)
    kl_coef: float = OWN  # of the KL to the stage's first parameters
    kl: str = ""  # k1 | k2 | k3 | k1+ | k3+
    kl_ratio: bool = False  # weight each token's KL by sg(pi/pi_old)
    kl_clamp: float = 10.0  # largest value of k3
    aggregation: str = ""
    norm: float = OWN  # C of "seq-mean-token-sum-norm"
    denominator: str = "all"  # "kept": only what regions and masks leave, of each micro-batch
    log_ratio_clamp: float = 20.0
    updates: int = 1  # optimizer updates per batch, each on its share of the rows

    def __post_init__(self) -> None:
        _one_of("name", self.name, tuple(METHODS))
        _one_of("denominator", self.denominator, ("all", "kept"))
        for key, allowed in _CHOICES.items():
            if getattr(self, key):
                _one_of(key, getattr(self, key), allowed)
        if self.updates < 1:
            raise UserError(f"loss.updates={self.updates}; use 1 or more")
        for key in ("eps_low", "eps_high", "dual_clip", "ratio_cap", "kl_coef", "norm"):
            value = getattr(self, key)
            if not (value >= 0.0 or value == OWN):
                raise UserError(f"loss.{key}={value}; use 0 (off), a positive number, or -1 (own)")
        _check_together({key: _value(self, key) for key in _SHARED})


def resolve(cfg: LossConfig) -> LossConfig:
    """The same method with every constant written out."""
    return replace(cfg, **{key: _value(cfg, key) for key in _SHARED})


def _value(cfg: LossConfig, key: str) -> Any:
    given = getattr(cfg, key)
    return METHODS[cfg.name][key] if given in (OWN, "", ()) else given


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"unknown loss.{key} {value!r}; use one of {', '.join(allowed)}")


def _check_together(own: dict[str, Any]) -> None:
    if own["aggregation"] == "seq-mean-token-sum-norm" and not own["norm"]:
        raise UserError(f"aggregation {own['aggregation']!r} needs a length; set norm, e.g. 1024")
    weights = [c.name for c in own["corrections"] if c.weights]
    twice = own["objective"] == "minirl" or (
        own["proximal"] == "bypass" and own["objective"] != "reinforce"
    )
    if weights and twice:
        raise UserError(
            f"correction {weights[0]!r} weights by pi_old/mu, but {own['objective']!r} with "
            f"proximal={own['proximal']!r} has mu in its ratio already: it would count twice; "
            "use a mask (geometric, mis, token_mask), or 'clip' with proximal='recompute'"
        )
