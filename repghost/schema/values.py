"""The types that keys have.

Check: `pytest tests/test_schema.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Keys that belong together. A word is no number, `true` is none either, and an unknown key is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def key(sentence: str | None = None, **limits: Any) -> Any:
    return Field(description=sentence, **limits)


def ascending(values: list[float]) -> list[float]:
    """Raises ValueError unless `values` ascend."""
    if values != sorted(values):
        raise ValueError("not ascending")
    return values


def _folder_name(name: str) -> str:
    if "/" in name or "\0" in name or name in (".", "..") or len(name.encode(errors="surrogateescape")) > 255:
        raise ValueError("not the name of a folder")
    return name


# "format" says that a value is taken as it was typed; "words" replaces what is derived of a type.
Path = Annotated[str, Field(min_length=1, json_schema_extra={"format": "path"})]
Text = Annotated[str, Field(min_length=1, json_schema_extra={"format": "text"})]
FolderName = Annotated[
    Text,
    AfterValidator(_folder_name),
    Field(json_schema_extra={"format": "text", "words": "the name of a folder, at most 255 bytes, without /"}),
]
Count = Annotated[int, Field(ge=1)]
Loader = Annotated[
    Literal["auto", "dali", "torch"],
    Field(description="what decodes; auto: dali where installed, unless data.workers is 0"),
]
Processes = Literal["auto"] | Annotated[int, Field(ge=0, le=512)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
ShareAboveZero = Annotated[float, Field(gt=0, le=1)]

PAIR: dict[str, Any] = {"min_length": 2, "max_length": 2, "json_schema_extra": {"shape": "[LOW,HIGH] in this order"}}
Shares = Annotated[list[ShareAboveZero], AfterValidator(ascending), Field(**PAIR)]
Positives = Annotated[list[Positive], AfterValidator(ascending), Field(**PAIR)]
_RGB: dict[str, Any] = {"min_length": 3, "max_length": 3, "json_schema_extra": {"shape": "[R,G,B]"}}
Mean = Annotated[list[Share], Field(**_RGB)]
Std = Annotated[list[ShareAboveZero], Field(**_RGB)]
Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(**_RGB)]

Target = Annotated[str, Field(alias="_target_", min_length=1)]
Partial = Annotated[Literal[True], Field(alias="_partial_")]
Convert = Annotated[Literal["all"], Field(alias="_convert_")]
Width = Annotated[float, Field(gt=0, le=10)]
Report = Literal["classes", "predictions", "confusion", "worst"]
ImageSize = Annotated[int, Field(ge=32, le=2048)]
