"""HANDLER_DIR: a handler of one's own over an image that exists, and the packages it needs."""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.image.conftest import links
from tests.image.engine import Built, CommandFailed, Engine, copy_of_context
from tests.image.test_image import shared

pytestmark = pytest.mark.timeout(900)

IMAGE = "localhost/tripod-test/handler"
HANDLER = "import greeting\nimport words\n\nprint(greeting.WORD, words.WORD)\n"
NEEDS = "greeting==1.0\nsix\n"
"""One package that the image lacks, and one that it has."""
RUN = """
import os, runpy, sys
print(os.environ["HANDLER"], sorted(os.listdir(os.environ["HANDLER"])))
sys.path.insert(0, os.environ["HANDLER"])
runpy.run_path(os.environ["HANDLER"] + "/handler.py")
"""


@dataclass(frozen=True)
class Workshop:
    """A checkout with a handler of one's own, and an index with two versions of what it needs."""

    engine: Engine
    base: Built
    context: Path
    pip: Path

    def write(self, name: str, text: str) -> None:
        path = self.context / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def build(self, folder: str = "my_handler", image: str = IMAGE) -> Built:
        return self.engine.build(
            image,
            context=self.context,
            dockerfile="Dockerfile.iteration",
            arguments={"WORKER_IMAGE": self.base.image, "HANDLER_DIR": folder},
            secrets={"pip.conf": self.pip},
        )

    def runs(self, image: str, *command: str) -> str:
        code, output = self.engine.once(image, "--entrypoint", command[0], command=command[1:])
        assert code == 0, output
        return output


def add_wheel(folder: Path, version: str) -> None:
    about = f"greeting-{version}.dist-info"
    files = {
        "greeting.py": f'WORD = "greeting {version}"\n',
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: greeting\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{about}/RECORD"))
    with zipfile.ZipFile(folder / f"greeting-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


@pytest.fixture(scope="module")
def workshop(
    engine: Engine, bundled: Built, wheels: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workshop]:
    context = copy_of_context(tmp_path_factory.mktemp("checkout"))
    index = tmp_path_factory.mktemp("index")
    for version in ("1.0", "2.0"):
        add_wheel(index, version)
    pip = tmp_path_factory.mktemp("pip") / "pip.conf"
    with links(index) as own:
        pip.write_text(f"[install]\nno-index = true\nfind-links = {wheels} {own}\n", "utf-8")
        workshop = Workshop(engine, bundled, context, pip)
        workshop.write("my_handler/handler.py", HANDLER)
        workshop.write("my_handler/words.py", 'WORD = "first"\n')
        workshop.write("my_handler/requirements.txt", NEEDS)
        workshop.write("my_handler/.env", "KEY=1\n")
        workshop.write("plain/handler.py", "print('no requirements')\n")
        yield workshop


@pytest.fixture(scope="module")
def built(workshop: Workshop) -> Built:
    return workshop.build()


def test_the_handler_is_there_with_its_packages(workshop: Workshop, built: Built) -> None:
    assert workshop.runs(built.image, "python3", "-c", RUN).splitlines() == [
        "/tripod/my_handler ['handler.py', 'requirements.txt', 'words.py']",
        "greeting 1.0 first",
    ]
    layers, base = workshop.engine.layers(built.image), workshop.engine.layers(workshop.base.image)
    assert shared(layers, base) == len(base)


def test_the_packages_of_the_image_are_untouched(workshop: Workshop, built: Built) -> None:
    command = ("python3", "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check")
    before = set(workshop.runs(workshop.base.image, *command).split())
    assert set(workshop.runs(built.image, *command).split()) - before == {"greeting==1.0"}


def test_an_edit_of_the_handler_is_one_new_layer(workshop: Workshop, built: Built) -> None:
    workshop.write("my_handler/words.py", 'WORD = "edited"\n')
    workshop.write("my_handler/handler.py", HANDLER + "# edited\n")
    again = workshop.build(image=f"{IMAGE}-edited")
    assert workshop.runs(again.image, "python3", "-c", RUN).endswith("greeting 1.0 edited")
    before, after = workshop.engine.layers(built.image), workshop.engine.layers(again.image)
    assert len(before) == len(after) == shared(before, after) + 1
    assert "Successfully installed" in built.log
    assert "Successfully installed" not in again.log


def test_an_edit_of_the_requirements_installs_them(workshop: Workshop, built: Built) -> None:
    workshop.write("my_handler/requirements.txt", NEEDS.replace("1.0", "2.0"))
    again = workshop.build(image=f"{IMAGE}-newer")
    workshop.write("my_handler/requirements.txt", NEEDS)
    assert "greeting 2.0" in workshop.runs(again.image, "python3", "-c", RUN)


def test_a_handler_may_need_nothing(workshop: Workshop) -> None:
    again = workshop.build("plain", f"{IMAGE}-plain")
    assert workshop.runs(again.image, "python3", "-c", RUN).splitlines() == [
        "/tripod/plain ['handler.py']",
        "no requirements",
    ]


def test_no_handler_leaves_everything_as_it_is(workshop: Workshop) -> None:
    image = workshop.build("", f"{IMAGE}-none").image
    config = workshop.engine.inspect(image)["Config"]
    assert [entry for entry in config["Env"] if entry.startswith("HANDLER")] in ([], ["HANDLER="])
    files = ("find", "/tripod", "-type", "f", "-not", "-name", "*.pyc")
    assert sorted(workshop.runs(image, *files).split()) == sorted(
        workshop.runs(workshop.base.image, *files).split()
    )


@pytest.mark.parametrize(
    ("folder", "files", "sentence"),
    [
        ("nowhere", {}, "HANDLER_DIR=nowhere: there is no nowhere/handler.py in the build context"),
        ("empty", {"words.py": ""}, "HANDLER_DIR=empty: there is no empty/handler.py"),
        (
            "greedy",
            {"handler.py": "", "requirements.txt": "pydantic==1.0\n"},
            "HANDLER_DIR=greedy: its requirements.txt can't be installed",
        ),
    ],
)
def test_what_is_wrong_ends_the_build_in_one_sentence(
    workshop: Workshop, folder: str, files: dict[str, str], sentence: str
) -> None:
    for name, text in files.items():
        workshop.write(f"{folder}/{name}", text)
    with pytest.raises(CommandFailed, match=re.escape(sentence)):
        workshop.build(folder, f"{IMAGE}-wrong")
