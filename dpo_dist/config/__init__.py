"""The whole run as frozen pydantic models, and the strict loader.

    section.py     what all sections have in common
    models.py      every option: meaning, unit, default, bounds (adapter.py, data.py, evaluation.py, loss.py,
                   reference.py: of these sections)
    rules.py       which combinations are impossible, and which keys have no effect in a combination
    source_rules.py the same of the sections adapter and reference
    loss_rules.py  the same of the section loss
    evaluation_rules.py the same of the sections evaluation and health
    foreign.py     names that other systems use for our options
    guesses.py     what a misspelt name was meant to be
    yaml_lines.py  YAML with the line of every key
    deepspeed.py   the DeepSpeed file: only what DeepSpeed alone needs (deepspeed_keys.py: which keys those are)
    addresses.py   paths that are URLs, and what of them may be shown
    files.py       files that are shipped with the package, and how a relative path is looked up
    messages.py    what is wrong with a key, in one line
    table.py       every option as a Markdown table
    draft.py       raw values of a file and its overrides
    loader.py      file + overrides -> RunConfig, or all errors at once; and back

Imports neither torch nor transformers: a mistake in a configuration is reported before anything slow happens.
"""

from dpo_dist.config.adapter import AdapterConfig
from dpo_dist.config.addresses import is_url, is_web, shown_url, without_secrets
from dpo_dist.config.data import DataConfig, DataSource, Pairing, Rated
from dpo_dist.config.deepspeed import load_deepspeed
from dpo_dist.config.evaluation import BEST_BY, EvaluationConfig, HealthConfig
from dpo_dist.config.files import package_file
from dpo_dist.config.loader import config_remarks, dump_resolved, json_schema, load_config
from dpo_dist.config.loss import LOSS_TYPES, LossConfig
from dpo_dist.config.models import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    PackingConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from dpo_dist.config.reference import ReferenceConfig
from dpo_dist.config.rules import is_local, keys_without_effect
from dpo_dist.config.table import options_table

__all__ = [
    "BEST_BY",
    "LOSS_TYPES",
    "AdapterConfig",
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "EvaluationConfig",
    "HealthConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "PackingConfig",
    "Pairing",
    "ParallelConfig",
    "Rated",
    "ReferenceConfig",
    "RunConfig",
    "TrainConfig",
    "config_remarks",
    "dump_resolved",
    "is_local",
    "is_url",
    "is_web",
    "json_schema",
    "keys_without_effect",
    "load_config",
    "load_deepspeed",
    "options_table",
    "package_file",
    "shown_url",
    "without_secrets",
]
