"""What the image is made of: its layers, its packages, what a wrong environment makes it say."""

import re
from itertools import takewhile
from pathlib import Path

import pytest

from tests.image.conftest import BUNDLED, ITERATION, MODEL, Recipe
from tests.image.engine import BASE, Built, Engine, copy_of_context

pytestmark = pytest.mark.timeout(900)

QUEUE = ("--env", "RUNPOD_WEBHOOK_GET_JOB=http://127.0.0.1:9/job-take/$ID")
"""A queue that nobody serves, for workers that end before they would ask it."""


def shared(one: list[str], other: list[str]) -> int:
    """How many layers two images have in common, counted from the lowest."""
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return len(list(equal))


def test_the_layers_stand_on_the_base_in_order(engine: Engine, bundled: Built) -> None:
    layers, base = engine.layers(bundled.image), engine.layers(BASE)
    assert shared(layers, base) == len(base)

    history = engine("history", "--no-trunc", "--format", "{{.CreatedBy}}", bundled.image)
    steps = (
        "COPY.* /tripod/worker/",
        "preload --into /models",
        "COPY.* /tripod/preload/",
        "install .*tini",
    )
    found = [re.search(step, history) for step in steps]
    assert all(found), history
    assert sorted(match.start() for match in found if match) == [m.start() for m in found if m]


def test_the_image_tells_what_it_is(engine: Engine, bundled: Built) -> None:
    config = engine.inspect(bundled.image)["Config"]
    assert config["Entrypoint"] == ["tini", "--", "/tripod/start.sh"]
    assert {"22/tcp", "8888/tcp"} <= config["ExposedPorts"].keys()
    assert config["Labels"]["org.opencontainers.image.title"] == "Tripod"
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert environment["MODEL"] == MODEL
    assert environment["MODE_TO_RUN"] == "pod"
    assert environment["CONCURRENCY_MODIFIER"] == "1"
    assert environment["MAX_MODEL_LEN"] == "25000"
    assert "HF_TOKEN" not in environment


def test_what_the_base_had_installed_is_untouched(engine: Engine, bundled: Built) -> None:
    def packages(image: str) -> set[str]:
        command = ("-m", "pip", "list", "--format=freeze", "--disable-pip-version-check")
        code, output = engine.once(image, "--entrypoint", "python3", command=command)
        assert code == 0, output
        return set(output.split())

    before, after = packages(BASE), packages(bundled.image)
    assert before <= after
    assert any(package.startswith("jupyterlab==") for package in after - before)


BYTECODE = """
import importlib.util, os
for name in ("vllm", "torch", "transformers", "runpod", "preload.weights", "worker.handler"):
    if importlib.util.find_spec(name.partition(".")[0]):
        found = importlib.util.find_spec(name)
        print(name, os.path.exists(importlib.util.cache_from_source(found.origin)))
"""


def test_no_start_compiles_what_the_image_holds(
    engine: Engine, bundled: Built, iteration: Built
) -> None:
    def compiled(image: str) -> dict[str, str]:
        code, output = engine.once(image, "--entrypoint", "python3", command=("-c", BYTECODE))
        assert code == 0, output
        return dict(line.split() for line in output.splitlines())

    assert compiled(BASE)["vllm"] == "False"  # else this would prove nothing
    for image in (bundled.image, iteration.image):
        found = compiled(image)
        assert len(found) == 6
        assert set(found.values()) == {"True"}, found
    layers = engine("history", "--no-trunc", "--format", "{{.Size}} {{.CreatedBy}}", bundled.image)
    [size] = [line.split(" RUN ")[0] for line in layers.splitlines() if "compile_dir" in line]
    engine.figures["bytecode of the packages"] = size[:20]


def test_the_iteration_image_adds_its_layers_and_nothing_else(
    engine: Engine, bundled: Built, iteration: Built
) -> None:
    lower, upper = engine.layers(bundled.image), engine.layers(iteration.image)
    assert shared(lower, upper) == len(lower)
    added = engine.inspect(iteration.image)["Size"] - engine.inspect(bundled.image)["Size"]
    assert 0 <= added < 1_000_000
    engine.figures["Dockerfile.iteration adds"] = (
        f"{len(upper) - len(lower)} layers, {added / 1000:.1f} kB"
    )


def test_an_edit_is_in_the_iteration_image_and_what_was_deleted_is_not(
    engine: Engine, bundled: Built, tmp_path: Path
) -> None:
    context = copy_of_context(tmp_path)
    handler = context / "worker" / "handler.py"
    handler.write_text(handler.read_text(encoding="utf-8") + "\nEDITED = True\n", encoding="utf-8")
    (context / "worker" / "tryout.py").unlink()
    image = f"{ITERATION}-edited"
    engine.build(
        image,
        context=context,
        dockerfile="Dockerfile.iteration",
        arguments={"WORKER_IMAGE": bundled.image},
    )
    code, output = engine.once(
        image,
        *("--entrypoint", "sh"),
        command=("-c", "tail -n 1 worker/handler.py; ls worker; ls -d /models/*"),
    )
    assert code == 0
    assert output.startswith("EDITED = True")
    assert "tryout.py" not in output
    assert "/models/tripod--tiny" in output


def test_an_edit_of_the_worker_does_not_run_preload_again(
    engine: Engine, bundled: Built, recipe: Recipe, tmp_path: Path
) -> None:
    context = copy_of_context(tmp_path)
    with (context / "worker" / "handler.py").open("a", encoding="utf-8") as handler:
        handler.write("\nEDITED = True\n")
    fetched = list(recipe.hub.requests)
    assert fetched
    again = engine.build(
        f"{BUNDLED}-edited", context=context, arguments=recipe.arguments, secrets=recipe.secrets
    )
    assert recipe.hub.requests == fetched
    assert "hash verified" in bundled.log
    assert "hash verified" not in again.log
    before, after = engine.layers(bundled.image), engine.layers(again.image)
    assert len(before) - 2 <= shared(before, after) < len(before)


def test_an_empty_model_bakes_nothing(engine: Engine, bundled: Built, recipe: Recipe) -> None:
    fetched = list(recipe.hub.requests)
    image = "localhost/tripod-test/unbundled"
    engine.build(image, arguments=recipe.arguments | {"MODEL": ""}, secrets=recipe.secrets)
    assert recipe.hub.requests == fetched
    code, output = engine.once(
        image, "--entrypoint", "sh", command=("-c", 'ls -A /models; echo "MODEL=$MODEL"')
    )
    assert (code, output) == (0, "MODEL=")


def test_a_wrong_token_ends_the_build_in_one_sentence(
    engine: Engine, bundled: Built, recipe: Recipe, tmp_path: Path
) -> None:
    wrong = tmp_path / "HF_TOKEN"
    wrong.write_text("hf_" + "0" * 34, encoding="utf-8")
    with pytest.raises(Exception, match=r"preload: MODEL=tripod/other: .*HF_TOKEN"):
        engine.build(
            f"{BUNDLED}-refused",
            arguments=recipe.arguments | {"MODEL": "tripod/other"},
            secrets=recipe.secrets | {"HF_TOKEN": wrong},
        )


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (
            ("--env", "MODE_TO_RUN=sideways"),
            2,
            r"MODE_TO_RUN=sideways: must be 'serverless', 'pod', 'both', .*",
        ),
        (
            ("--env", "MODE_TO_RUN=serverless"),
            2,
            r"RUNPOD_WEBHOOK_GET_JOB: .*Runpod sets it.*",
        ),
        (
            ("--env", "MODE_TO_RUN=serverless", *QUEUE, "--shm-size", "64m"),
            1,
            r"ERROR *\| /dev/shm has 6\d MiB free, .*--shm-size 1g",
        ),
        (
            ("--env", "MODE_TO_RUN=serverless", *QUEUE, "--env", "MODEL=/nowhere"),
            1,
            r"ERROR *\| MODEL=/nowhere: .*",
        ),
        (
            ("--env", "MODE_TO_RUN=serverless", *QUEUE, "--env", "MODEL=tripod/absent"),
            1,
            r"ERROR *\| MODEL=tripod/absent: .*",
        ),
    ],
    ids=["unknown mode", "no queue", "small /dev/shm", "no such folder", "no such model"],
)  # fmt: skip
def test_a_wrong_environment_is_one_clear_sentence(
    engine: Engine, iteration: Built, options: tuple[str, ...], code: int, sentence: str
) -> None:
    ended, output = engine.once(iteration.image, *options)
    assert ended == code, output
    told = r"(INFO|WARNING) *\||--- Starting Serverless Worker"
    complaints = [line for line in output.splitlines() if not re.match(told, line)]
    assert len(complaints) == 1, output
    assert re.fullmatch(sentence, complaints[0]), output
