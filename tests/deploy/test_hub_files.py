"""`.runpod/` is what Runpod's Hub documents, and what the worker and the image understand.

The rules are those of the Hub publishing guide (docs.runpod.io/hub/publishing-guide; in the
repository runpod/docs: hub/publishing-guide.mdx, read at a900806 of August 2026); where another
page is the source, the rule names it. A field that the guide does not know is refused.
"""

import json
import os
import subprocess
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tests.support import ROOT
from worker import configuration
from worker.job import input as requests
from worker.settings import ALSO_READ, Settings

RUNPOD = ROOT / ".runpod"
MAKE_DOCKERFILE = (
    "sed -e '1i # Made of Dockerfile, for the Hub, which gives no build arguments: nothing is "
    "baked.' -e 's|^ARG MODEL=.*|ARG MODEL=|' "
    "-e 's|^ARG MODE_TO_RUN=.*|ARG MODE_TO_RUN=serverless|' Dockerfile"
)
"""The Hub builds the default target of .runpod/Dockerfile, which goes before the root's."""


class Documented(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Name = Annotated[str, Field(min_length=1)]

CudaVersion = Literal[
    "13.0", "12.9", "12.8", "12.7", "12.6", "12.5", "12.4", "12.3", "12.2", "12.1", "12.0", "11.8"
]
"""`allowedCudaVersions` of EndpointCreateInput in runpod/docs: api-reference/openapi.json."""

GPU_POOLS = {
    "AMPERE_16", "AMPERE_24", "ADA_24", "AMPERE_48", "ADA_48_PRO", "AMPERE_80", "ADA_80_PRO",
    "HOPPER_141",
}  # fmt: skip
"""The table "GPU pools" in runpod/docs: references/gpu-types.mdx."""

GpuType = Literal[
    "NVIDIA GeForce RTX 4090", "NVIDIA L4", "NVIDIA L40S", "NVIDIA A40", "NVIDIA RTX A5000",
    "NVIDIA A100 80GB PCIe", "NVIDIA H100 80GB HBM3",
]  # fmt: skip
"""Some of the GPU ids in the table "GPU types" in runpod/docs: references/gpu-types.mdx."""


def _pools(text: str) -> str:
    """Pool ids with commas between, then GPU ids to leave out, each after a minus."""
    unknown = {part for part in text.split(",") if not part.startswith("-")} - GPU_POOLS
    if unknown:
        raise ValueError(f"unknown GPU pools: {sorted(unknown)}")
    return text


class Option(Documented):
    """A choice of an option input."""

    label: Name
    value: str


class _Input(Documented):
    """`advanced` hides it; `required` stands in the guide's Hugging Face example."""

    name: Name
    description: Name
    advanced: bool = False
    required: bool = False


class StringInput(_Input):
    """A text field, or with `options` a choice: the default is one of them."""

    type: Literal["string"]
    default: str | None = None
    options: list[Option] | None = None


class HuggingFaceInput(_Input):
    """A model of the Hugging Face hub."""

    type: Literal["huggingface"]
    default: str | None = None


class NumberInput(_Input):
    """A number, with bounds or without."""

    type: Literal["number"]
    default: float | None = None
    min: float | None = None
    max: float | None = None


class BooleanInput(_Input):
    """A switch, and the texts that it stands for."""

    type: Literal["boolean"]
    default: bool
    trueValue: str = "true"  # noqa: N815 - the Hub's names, here and below
    falseValue: str = "false"  # noqa: N815


class Static(Documented):
    """A variable with a value: "Static variables", and `env` of tests.json."""

    key: Name
    value: str


class Asked(Documented):
    """A variable that the user is asked for."""

    key: Name
    input: Annotated[
        StringInput | HuggingFaceInput | NumberInput | BooleanInput, Field(discriminator="type")
    ]


class Preset(Documented):
    """A named group of defaults."""

    name: Name
    defaults: dict[str, str | int | float | bool]


class _Gpu(Documented):
    """`gpuCount` and `gpuIds` go with `runsOn` GPU, `cpuFlavor` with CPU; Tripod's is a GPU."""

    runsOn: Literal["GPU"]  # noqa: N815
    endpointType: Literal["LB"] | None = None  # noqa: N815
    containerDiskInGb: Annotated[int, Field(gt=0)]  # noqa: N815
    gpuCount: Annotated[int, Field(gt=0)]  # noqa: N815
    gpuIds: Annotated[str, AfterValidator(_pools)]  # noqa: N815
    allowedCudaVersions: list[CudaVersion] = []  # noqa: N815
    presets: list[Preset] = []
    env: list[Static | Asked] = []


class Hub(Documented):
    """hub.json: "General metadata" and "Runpod configuration"."""

    title: Name
    description: Name
    type: Literal["serverless"]
    category: Literal["audio", "embedding", "language", "video", "image"]
    iconUrl: str | None = None  # noqa: N815
    config: _Gpu


class Test(Documented):
    """One test: a job's input, and the milliseconds that it may take."""

    __test__ = False

    name: Name
    input: dict[str, Any]
    timeout: Annotated[int, Field(gt=0)] | None = None


class TestConfig(Documented):
    """Where the tests run; `gpuTypeId` and `gpuCount` belong to GPU tests."""

    __test__ = False

    gpuTypeId: GpuType  # noqa: N815
    gpuCount: Annotated[int, Field(gt=0)]  # noqa: N815
    env: list[Static] = []
    allowedCudaVersions: list[CudaVersion] = []  # noqa: N815


class Tests(Documented):
    """tests.json."""

    __test__ = False

    tests: Annotated[list[Test], Field(min_length=1)]
    config: TestConfig


PLATFORMS_OWN = {"RUNPOD_INIT_TIMEOUT"}
"""Read by Runpod itself (runpod/docs: serverless/development/optimization.mdx): without it a
worker that takes longer than 7 minutes to start counts as unhealthy."""


@pytest.fixture(scope="module")
def hub() -> Hub:
    return Hub.model_validate_json((RUNPOD / "hub.json").read_bytes())


@pytest.fixture(scope="module")
def tests() -> Tests:
    return Tests.model_validate_json((RUNPOD / "tests.json").read_bytes())


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The worker's settings in an environment of these variables alone."""

    def settings_of(variables: dict[str, str]) -> Settings:
        for name in [*map(str.upper, Settings.model_fields), *ALSO_READ]:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "set by Runpod")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return configuration.load(os.environ)

    return settings_of


def text(entry: Static | Asked, value: Any) -> str:
    """The value as the variable's text."""
    if isinstance(entry, Asked) and isinstance(entry.input, BooleanInput):
        return entry.input.trueValue if value else entry.input.falseValue
    return f"{value:g}" if isinstance(value, float) else str(value)


def environment(hub: Hub, preset: Preset | None = None) -> dict[str, str]:
    """The environment of a worker whose user changed nothing but the preset."""
    chosen = preset.defaults if preset else {}
    given = {}
    for entry in hub.config.env:
        default = entry.value if isinstance(entry, Static) else entry.input.default
        value = chosen.get(entry.key, default)
        if value is not None:
            given[entry.key] = text(entry, value)
    return given


def test_the_variables_are_the_workers_own(hub: Hub, tests: Tests) -> None:
    known = {name.upper() for name in Settings.model_fields} | PLATFORMS_OWN
    keys = [entry.key for entry in hub.config.env]
    assert len(keys) == len(set(keys))
    assert set(keys) <= known
    assert {entry.key for entry in tests.config.env} <= known
    for preset in hub.config.presets:
        assert preset.defaults.keys() <= set(keys), preset.name


def test_a_default_is_one_of_its_options_and_within_its_bounds(hub: Hub) -> None:
    for entry in hub.config.env:
        if not isinstance(entry, Asked):
            continue
        asked = entry.input
        values = [p.defaults[entry.key] for p in hub.config.presets if entry.key in p.defaults]
        values += [] if asked.default is None else [asked.default]
        for value in values:
            if isinstance(asked, StringInput) and asked.options:
                assert value in {option.value for option in asked.options}, entry.key
            if isinstance(asked, NumberInput):
                assert asked.min is None or value >= asked.min, entry.key
                assert asked.max is None or value <= asked.max, entry.key
            if isinstance(asked, BooleanInput):
                assert isinstance(value, bool), entry.key


def test_the_defaults_of_the_listing_are_those_of_the_worker(hub: Hub, load: Any) -> None:
    """But for those in which a Hub listing wants another."""
    ours = {"MODEL", "MODE_TO_RUN", "CONCURRENCY_MODIFIER", "PORT"}
    loaded = load(environment(hub))
    for entry in hub.config.env:
        if entry.key not in ours | PLATFORMS_OWN:
            field = Settings.model_fields[entry.key.lower()]
            assert getattr(loaded, entry.key.lower()) == field.default, entry.key


def test_the_worker_takes_every_preset(hub: Hub, load: Any) -> None:
    modes = [load(environment(hub, preset)).mode_to_run for preset in hub.config.presets]
    assert modes == ["serverless", "api"]


def test_the_load_balancer_reaches_the_worker(hub: Hub, load: Any) -> None:
    """It asks port 80 unless told otherwise (runpod/docs: serverless/load-balancing/overview)."""
    loaded = load(environment(hub, hub.config.presets[1]))
    assert (loaded.host, loaded.port, loaded.port_health) == ("0.0.0.0", 80, None)
    assert loaded.platform_auth


def test_the_worker_takes_every_test(tests: Tests, load: Any) -> None:
    loaded = load({entry.key: entry.value for entry in tests.config.env})
    assert loaded.mode_to_run == "serverless"
    for test in tests.tests:
        requests.parse(test.input)


def test_the_image_can_start_as_long_as_runpod_waits(hub: Hub) -> None:
    given = environment(hub)
    assert float(given["RUNPOD_INIT_TIMEOUT"]) >= float(given["STARTUP_TIMEOUT"])


def test_the_files_that_the_hub_looks_for_are_there() -> None:
    """handler.py, Dockerfile and README.md, "in either the .runpod or root directory"."""
    for name in ("handler.py", "Dockerfile", "README.md"):
        assert (RUNPOD / name).is_file() or (ROOT / name).is_file(), name
    assert (RUNPOD / "handler.py").samefile(ROOT / "worker" / "handler.py")


def test_the_hubs_dockerfile_is_made_of_ours() -> None:
    made = subprocess.run(
        MAKE_DOCKERFILE, shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert (RUNPOD / "Dockerfile").read_text(encoding="utf-8") == made, (
        f"make it anew: {MAKE_DOCKERFILE} >.runpod/Dockerfile"
    )
    assert "\nARG MODEL=\n" in made
    assert "\nARG MODE_TO_RUN=serverless\n" in made


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ([], {"category": "text"}),
        ([], {"iconURL": "misspelled"}),
        (["config"], {"endpointType": "QB"}),
        (["config"], {"gpuIds": "ADA_24,RTX 4090"}),
        (["config"], {"allowedCudaVersions": ["13"]}),
        (["config", "env", 0], {"input": {"type": "text"}}),
    ],
)
def test_the_rules_refuse_what_is_not_documented(
    place: list[str | int], change: dict[str, Any]
) -> None:
    changed = part = json.loads((RUNPOD / "hub.json").read_text(encoding="utf-8"))
    for step in place:
        part = part[step]
    part |= change
    with pytest.raises(ValidationError) as refused:
        Hub.model_validate(changed)
    (name,) = change
    assert any(name in error["loc"] for error in refused.value.errors())
