"""Which source a run takes, and the reason it gives."""

from dataclasses import replace

import pytest

from dpo_dist.config import ReferenceConfig
from dpo_dist.reference import Situation, choose_source

ONCE = Situation(
    has_reference=True,
    beyond_a_cache="",
    has_adapters=False,
    base_is_reference=True,
    passes=1.0,
    num_rows=0,
    num_cached=0,
    policy_gib=16.0,
    reference_gib=2.0,
    device_gib=80.0,
)
STORED = {"num_rows": 48, "num_cached": 48}


@pytest.mark.parametrize(
    ("settings", "situation", "source", "reason"),
    [
        ({}, {}, "live", "once"),
        ({}, {"device_gib": None}, "live", "once"),
        ({}, {"passes": 3.0}, "cache", "3 times"),
        ({}, {"passes": 1.1}, "cache", "1.1 times"),
        ({}, {"passes": 0.5}, "live", "once"),
        ({}, STORED, "cache", "complete"),
        ({}, {**STORED, "num_cached": 47}, "live", "once"),
        ({}, {"has_adapters": True}, "adapter_off", "no second model"),
        ({}, {"has_adapters": True, "passes": 2.0}, "cache", "2 times"),
        ({}, {"has_adapters": True, **STORED}, "cache", "complete"),
        ({}, {"has_adapters": True, "base_is_reference": False}, "live", "once"),
        ({"dtype": "bfloat16"}, {"has_adapters": True}, "live", "once"),
        ({}, {"reference_gib": 60.0}, "cache", "76 GiB of each device's 80 GiB"),
        ({}, {"reference_gib": 47.9}, "live", "two models fit"),
        ({"cache_dir": "x"}, {}, "cache", "reference.cache_dir"),
        ({"per_microbatch": True}, {"passes": 3.0}, "live", "per_microbatch"),
        ({"sync_ref_model": True}, {"passes": 3.0, **STORED}, "live", "sync_ref_model"),
        ({"source": "live"}, {"passes": 3.0, **STORED}, "live", "as configured"),
        ({"source": "none"}, {}, "none", "as configured"),
        ({"source": "cache"}, {}, "cache", "as configured"),
        ({"source": "adapter_off"}, {"has_adapters": True, "passes": 3.0}, "adapter_off", "as configured"),
    ],
)
def test_choice(settings: dict, situation: dict, source: str, reason: str) -> None:
    found, why = choose_source(ReferenceConfig(**settings), replace(ONCE, **situation))
    assert found == source
    assert reason in why


def test_without_a_loss_that_reads_one_there_is_no_reference() -> None:
    assert choose_source(ReferenceConfig(), replace(ONCE, has_reference=False))[0] == "none"
    assert choose_source(ReferenceConfig(source="live"), replace(ONCE, has_reference=False))[0] == "live"


def test_a_loss_of_tokens_takes_no_cache() -> None:
    often = replace(ONCE, beyond_a_cache="a loss of tokens", passes=3.0)
    assert choose_source(ReferenceConfig(), often)[0] == "live"
    assert choose_source(ReferenceConfig(), replace(often, has_adapters=True))[0] == "adapter_off"
