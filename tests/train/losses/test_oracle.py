"""Our losses, advantages, corrections and KL estimators against the peers' own functions."""

from __future__ import annotations

import pytest

from tests.golden.rl import compare
from tests.golden.rl.table import TABLE, NotOffered, Offered

CASES = compare.load()
OFFERED = [c for c in CASES if isinstance(TABLE.get(c.id.split("__")[0]), Offered)]

#: What the package promises to have: none of its cases may be left out of the table.
PROMISED = {
    *("minirl", "ppo", "dapo", "drgrpo", "grpo", "rloo", "rfpp", "gspo", "cispo", "dppo_tv"),
    *("tis_token", "tis_seq", "icepop", "mask_product", "mask_geometric", "prox_loglinear"),
    *("kl_k1", "kl_k2", "kl_k3", "kl_k3+", "overlong"),
}


def test_every_case_is_in_the_table() -> None:
    assert [c.id for c in CASES if c.id.split("__")[0] not in TABLE] == []


def test_what_is_not_offered_is_not_promised() -> None:
    left_out = {c.id.split("__")[0] for c in CASES} - {c.id.split("__")[0] for c in OFFERED}
    assert {prefix.split("_", 1)[1] for prefix in left_out} & PROMISED == set()
    assert len(OFFERED) > 450
    for prefix in left_out:
        entry = TABLE[prefix]
        assert isinstance(entry, NotOffered) and entry.reason


@pytest.mark.parametrize("family", sorted({c.meta["family"] for c in CASES}))
def test_reference(family: str) -> None:
    wrong = {}
    for case in OFFERED:
        if case.meta["family"] == family:
            entry = TABLE[case.id.split("__")[0]]
            assert isinstance(entry, Offered)
            found = compare.check(case, entry.fn)
            if found:
                wrong[case.id] = found
    assert wrong == {}
