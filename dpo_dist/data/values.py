"""Values inside of a row: of the wanted type, text that can be written, nothing that only a schema has put there."""

from typing import Any, NoReturn

from dpo_dist.data.example import BROKEN_TEXT, RowError

MAX_TOKEN_ID = 2**31 - 1


def token_ids_of(value: Any, column: str, source: str) -> tuple[int, ...]:
    """A list of token ids."""
    if not isinstance(value, list):
        wrong_type(source, column, value, "a list of token ids")
    for index, token in enumerate(value):
        if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
            wrong_type(source, f"{column}[{index}]", token, "a token id (an integer >= 0)")
    return tuple(value)


def without_nulls(value: Any) -> Any:
    """Drop keys that are null: one rule, whatever the file.

    One schema for all rows, as in Parquet, gives every message and every argument the keys of all the others, so null
    can mean nothing else there; and the same rows give the same tokens in any format.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def check_nested(value: Any, where: str, source: str) -> None:
    """Every string in it, names included, can be written as UTF-8."""
    if isinstance(value, str):
        check_text(value, where, source)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(str(key), f"a name in {where}", source)
            check_nested(item, where, source)
    elif isinstance(value, list):
        for item in value:
            check_nested(item, where, source)


def check_text(text: str, where: str, source: str) -> None:
    """A string that can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{source}: {where} holds half of a surrogate pair at character {error.start}; "
            "write the character as UTF-8 or as a complete \\uXXXX\\uXXXX pair",
            BROKEN_TEXT,
        ) from None


def wrong_type(source: str, where: str, value: Any, wanted: str) -> NoReturn:
    """Refuse a value, with what is wanted in its place."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise RowError(f"{source}: {where}={shown} is of the wrong type ({type(value).__name__}); give {wanted}")
