"""What `bench TARGET` measured: raw samples, and the numbers that are derived from them.

A report outlives the run: it is read back to compare with another.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from microclip_deploy.errors import DataError

IMAGE_TO_LOGITS, JPEG_TO_LOGITS = "image -> logits", "JPEG -> logits"
COPY, PRODUCT = "copy_bytes_per_s", "product_flop_per_s"
"""Keys of the ceilings."""

_STORED = ConfigDict(strict=True, allow_inf_nan=False)
_Samples = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


class Stage(StrEnum):
    """A part of a request, in its order."""

    DECODE = "decode"
    PREPROCESS = "preprocess"
    H2D = "H2D"
    BACKBONE = "backbone"
    K1 = "K1"
    K2 = "K2"
    SALIENCY = "K1+K2"
    HEAD = "K3/head"
    D2H = "D2H"
    POST = "post"


_FROM_VIEWS = set(Stage) - {Stage.DECODE, Stage.PREPROCESS, Stage.POST}
"""What lies between views and logits."""


class Case(NamedTuple):
    """What a row measured, whoever was measured."""

    scope: str
    """What a request holds, such as `IMAGE_TO_LOGITS`."""
    batch: int
    concurrency: int


class _Sampled:
    """What raw samples have in common."""

    samples_s: list[float]

    def percentile(self, q: float) -> float:
        """Return the q-th percentile of the samples in seconds, linear between two samples."""
        return float(np.percentile(self.samples_s, q))

    @property
    def median_s(self) -> float:
        """Median of the samples, seconds."""
        return self.percentile(50)


@dataclass(frozen=True, kw_only=True, config=_STORED)
class Row(_Sampled):
    """One contestant at one batch size."""

    contestant: str
    scope: str
    """What a request holds, such as "image -> logits"."""
    batch: PositiveInt
    concurrency: PositiveInt
    """Requests under way at once."""
    samples_s: _Samples
    """Raw, seconds a request."""
    images_per_s: float
    stable: bool
    spread: float
    """Share by which repeated measurements differ."""
    host_s: _Samples | None = None
    """Seconds until everything is launched, where there is a device; other requests."""
    device_s: _Samples | None = None
    """Seconds between CUDA events around the same work."""
    warnings: list[str] = Field(default_factory=list)

    @property
    def case(self) -> Case:
        """What was measured."""
        return Case(self.scope, self.batch, self.concurrency)

    @property
    def mean_s(self) -> float:
        """Mean of the samples, seconds."""
        return float(np.mean(self.samples_s))

    def __str__(self) -> str:
        """Name the row in a sentence."""
        return f"{self.contestant}, {self.scope}, batch {self.batch}, {self.concurrency} at once"


@dataclass(frozen=True, kw_only=True, config=_STORED)
class StageRow(_Sampled):
    """One stage of a request at one batch size."""

    stage: str
    batch: PositiveInt
    samples_s: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]
    """Raw, seconds a batch; what is a difference of two times is cut off at 0."""
    flop: int | None = None
    """Counted, a batch; None where it makes no sense."""
    bytes: int | None = None
    floor_s: float | None = None
    """Seconds a batch needs at least, at the ceilings of the same run."""

    @property
    def of_floor(self) -> float | None:
        """The floor's share in the median: 1 is perfect; None where either is not known."""
        return None if self.floor_s is None or not self.median_s else self.floor_s / self.median_s


@dataclass(frozen=True, kw_only=True, config=_STORED)
class Report:
    """Everything one run measured."""

    benchmark: Literal["latency"] = "latency"
    schema: Literal["microclip.bench/1"] = "microclip.bench/1"
    target: str
    """Name only, no path."""
    artifact_sha256: str
    precision: str
    device: str
    date: str
    """ISO day."""
    subject: str
    """The contestant that is the target itself; all ratios refer to it."""
    rows: list[Row]
    stages: list[StageRow] = Field(default_factory=list)
    absent: dict[str, str] = Field(default_factory=dict)
    """Peer -> why it is not there."""
    cold_start: dict[str, float] | None = None
    """Step -> seconds."""
    memory: dict[str, int] = Field(default_factory=dict)
    """What -> bytes."""
    ceilings: dict[str, float] | None = None
    """`COPY` and `PRODUCT` -> rate a second, measured in the same run."""
    timed: dict[str, str] = Field(default_factory=dict)
    """Contestant, stage or scope -> what is inside the timed region."""
    percentiles: list[Annotated[float, Field(ge=0, le=100)]] = Field(
        default_factory=lambda: [50.0, 90.0, 95.0, 99.0]
    )
    options: dict[str, str] = Field(default_factory=dict)
    """How it was measured."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """As `card.environment` returns it."""
    environment_after: dict[str, Any] | None = None
    """As `card.gpu` returns it at the end."""
    seconds: float = 0.0
    """The run itself took."""

    @model_validator(mode="after")
    def _measures_its_subject(self) -> Self:
        if self.subject not in {row.contestant for row in self.rows}:
            raise ValueError(f"rows: expected one of '{self.subject}'")
        return self

    def ratio(self, row: Row) -> float | None:
        """Return how many times as long as the target a row takes, by the medians.

        None where the target was not measured so.
        """
        ours = (r for r in self.rows if (r.contestant, r.case) == (self.subject, row.case))
        reference = next(ours, None)
        return None if reference is None else row.median_s / reference.median_s

    def stage_totals(self) -> dict[int, float]:
        """Return batch -> the medians of all its stages added, in seconds."""
        totals: dict[int, float] = {}
        for row in self.stages:
            totals[row.batch] = totals.get(row.batch, 0.0) + row.median_s
        return dict(sorted(totals.items()))

    def explained(self) -> dict[int, float]:
        """Return batch -> the model's stages added, as a share of the target's median from pixels.

        Above 1 where they take longer alone, as each call has a cost of its own. Empty where the
        target is measured in PyTorch: stages are those of the export.
        """
        if self.subject.startswith("torch"):
            return {}
        shares = {}
        for row in self.rows:
            if (row.contestant, row.scope, row.concurrency) == (self.subject, IMAGE_TO_LOGITS, 1):
                parts = [s for s in self.stages if s.batch == row.batch and s.stage in _FROM_VIEWS]
                shares[row.batch] = sum(stage.median_s for stage in parts) / row.median_s
        return {batch: share for batch, share in shares.items() if share}


_REPORT = TypeAdapter(Report)


def read_report(path: Path) -> Report:
    """Read a JSON file that `write_report` wrote; keys that it does not know are ignored.

    Raises:
        DataError: the file is missing, foreign or damaged; names the field.
    """
    try:
        return _REPORT.validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: expected a report of `bench`, found: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(
            f"{path}: {field}: {first['msg']}, found {str(first['input'])[:80]!r}; give a whole "
            "JSON file that `microclip-deploy bench` wrote"
        ) from error
