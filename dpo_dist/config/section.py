"""What all sections of a configuration have in common.

A docstring under a field is its help text, its description in `configs/schema.json`, and its line in the documentation.
TRL's and PEFT's names where they have a name. The models are frozen: a run never changes its configuration.
"""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Number = Annotated[float, Field(allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(pattern=r"\S")]


UNION_TAGS = ("one", "many")


def one_or_many(value: Any) -> str:
    """Which of `UNION_TAGS` a value is judged as, where an option takes one thing or a list of them."""
    return "many" if isinstance(value, list | tuple) else "one"


class Section(BaseModel):
    """Strict and frozen."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), hide_input_in_errors=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: Any) -> Any:
        """A bool is an int in Python, and becomes a number in pydantic; `beta: true` is a mistake, not 1.0.

        `info` is pydantic's ValidationInfo, a protocol that cannot be checked at run time.
        """
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {getattr(part, "__origin__", part) for part in (annotation, *get_args(annotation))}  # without Annotated
        if isinstance(value, bool) and kinds & {int, float}:
            raise ValueError("a truth value is not a number")
        return value
