"""What is kept of one config that was tried: plain data, checked whenever it is read.

Records come from other machines and other versions too, so nothing in them is trusted: every text is short, every
number bounded, and unknown fields are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from attncc.device import Device

SCHEMA: Final = 1

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
Text = Annotated[str, Field(max_length=64)]
Reason = Annotated[str, Field(max_length=2000)]
Count = Annotated[int, Field(ge=0, lt=2**40)]
Setting = Annotated[int, Field(ge=0, lt=2**31)]
Ratio = Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=1e-6, lt=1e9, allow_inf_nan=False)]

Status = Literal["measured", "illegal", "wrong", "crashed", "hung", "failed"]
"""How a trial ended. Only what is `measured` has a time; what is `illegal` never ran."""


class Data(BaseModel):
    """Frozen, and without fields that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Card(Data):
    """The physical device, with all by which another one is found to be like it."""

    name: Name
    arch: Name
    sms: Annotated[int, Field(gt=0, lt=2**20)]
    shared_bytes_per_block: Annotated[int, Field(gt=0, lt=2**40)]
    l2_bytes: Annotated[int, Field(gt=0, lt=2**40)]
    bandwidth_gbps: Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]
    bf16_tflops: Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]

    @classmethod
    def of(cls, device: Device) -> Card:
        return cls(**{field: getattr(device, field) for field in cls.model_fields})


class Toolchain(Data):
    """What made and ran the kernels."""

    attncc: Text
    torch: Text
    triton: Text
    ptxas: Text = ""
    driver: Text = ""


class Sparsity(Data):
    """What a mask leaves of the tiles of 128 x 128, as far as it decides between configs."""

    tiles: Ratio
    """Tiles that hold a kept pair, in the mean over rows of tiles."""
    variance: Ratio
    """Of their number, over the square of the mean."""
    full: Annotated[float, Field(ge=0, le=1)]
    """The share of those that the mask keeps whole."""
    skew: Ratio
    """Of columns: the tiles of the fullest one over the mean."""


class Resources(Data):
    """What the compiled kernels take, the largest of each."""

    registers: Count = 0
    spill_bytes: Count = 0
    shared_bytes: Count = 0


class Certificate(Data):
    """That a config was right: how often it was compared with fp64, on what, and how near it came to the limit."""

    cases: Annotated[int, Field(gt=0, lt=2**20)]
    inputs: Annotated[tuple[Text, ...], Field(max_length=64)]
    """Families of operands: random, one_hot, nan_around, …"""
    worst: Annotated[float, Field(ge=0, le=1)]
    """The largest error over what the acceptance rule allows."""
    gradients: bool = False


class Record(Data):
    """One config on one shape of one variant, on one card."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    variant: Name
    program: Digest
    """Of the variant: what it computes, not how its spec is written."""
    card: Card
    toolchain: Toolchain
    shape: Annotated[dict[Name, Count], Field(max_length=16)]
    sparsity: Sparsity | None = None
    config: Annotated[dict[Name, Setting], Field(min_length=1, max_length=64)]
    status: Status
    why: Reason = ""
    """What kept it from being measured."""
    ms: Milliseconds | None = None
    """Median."""
    spread: tuple[Milliseconds, Milliseconds] | None = None
    """Quartiles of the samples."""
    predicted_ms: Milliseconds | None = None
    resources: Resources | None = None
    certificate: Certificate | None = None
    when: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @model_validator(mode="after")
    def _has_time_if_measured(self) -> Record:
        if (self.status == "measured") != (self.ms is not None):
            raise ValueError(f"status '{self.status}' with ms={self.ms}")
        if self.certificate is not None and self.status != "measured":
            raise ValueError(f"a certificate, but status '{self.status}'")
        return self

    @property
    def key(self) -> tuple[object, ...]:
        """What is the same in records that can be compared."""
        return self.program, self.card.name, tuple(sorted(self.shape.items())), self.sparsity

    @property
    def knobs(self) -> tuple[tuple[str, int], ...]:
        """The config as a key of a dict."""
        return tuple(sorted(self.config.items()))


def latest(records: Iterable[Record]) -> list[Record]:
    """The newest record of each config on each case, the newest last: what was tried again counts once."""
    newest: dict[object, Record] = {}
    for record in sorted(records, key=lambda r: r.when):
        key = record.key, record.knobs
        newest.pop(key, None)
        newest[key] = record
    return list(newest.values())
