"""Columns that hold JSON as text because their values have no common type: what `datasets` calls `Json()`.

Read raw, a tool call would reach the model as quoted text. A schema says so in its types (the Arrow extension
`arrow.json`), or in the features that `datasets` writes into its metadata.
"""

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

Decoder = Callable[[Any], Any]


def json_decoders(schema: pa.Schema) -> dict[str, Decoder]:
    """For each column with JSON somewhere in it, what makes its Python value of it."""
    features = _features(schema)
    found = {field.name: _by_type(field.type) or _by_feature(features.get(field.name)) for field in schema}
    return {name: decoder for name, decoder in found.items() if decoder is not None}


def _features(schema: pa.Schema) -> dict[str, Any]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _by_type(kind: pa.DataType) -> Decoder | None:
    if isinstance(kind, pa.JsonType):
        return _parsed
    if pa.types.is_struct(kind):
        return _of_fields({field.name: _by_type(field.type) for field in kind})
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _of_items(_by_type(kind.value_type))
    return None


def _by_feature(feature: Any) -> Decoder | None:
    """The same of a feature as `datasets` writes it: `{"_type": "Json"}`, lists of one, structs by name."""
    if isinstance(feature, list):  # an older form of a list
        return _of_items(_by_feature(feature[0])) if len(feature) == 1 else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "Json":
        return _parsed
    if feature.get("_type") in ("List", "LargeList", "Sequence"):
        return _of_items(_by_feature(feature.get("feature")))
    if "_type" not in feature or isinstance(feature["_type"], dict):
        return _of_fields({name: _by_feature(inner) for name, inner in feature.items()})
    return None


def _of_fields(decoders: dict[str, Decoder | None]) -> Decoder | None:
    known = {name: decoder for name, decoder in decoders.items() if decoder is not None}
    if not known:
        return None

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: known[name](item) if name in known else item for name, item in value.items()}

    return decode


def _of_items(decoder: Decoder | None) -> Decoder | None:
    if decoder is None:
        return None

    def decode(value: Any) -> Any:
        return [decoder(item) for item in value] if isinstance(value, list) else value

    return decode


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
