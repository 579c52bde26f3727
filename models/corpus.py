"""The bundled model's text: the Python standard library's sources and help topics.

Everything is read from the running Python's own library and parsed with `ast`; nothing is
imported. The same Python version and seed give the same documents in the same order.
"""

import ast
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

Turn = dict[str, str]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# Tests, tables of data, third-party packages, files written by the build.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
SKIPPED_FILES = {"html/entities.py", "pydoc_data/topics.py", "stringprep.py", "this.py"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "__phello__")

# Never trained on, in no form: what the held-out loss is measured on.
HELD_OUT = {
    "bisect.py",
    "calendar.py",
    "csv.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
}

NO_QUESTIONS = ("idlelib", "lib2to3", "turtledemo", "ntpath")
PUBLIC_NAMES = {
    "posixpath": "os.path",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_collections_abc": "collections.abc",
}
MAX_ANSWER = 700  # characters

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "You are a helpful assistant. Answer briefly.",
)
QUESTIONS = {
    "module": (
        "What is the {} module?",
        "What is the module `{}` for?",
        "Tell me about the {} module.",
    ),
    "class": ("What is {}?", "What is the class `{}` for?", "Explain the class {}."),
    "function": (
        "What does {} do?",
        "What does `{}` do?",
        "Explain the function {}.",
        "How does {}() work?",
    ),
    "signature": ("What are the arguments of {}?", "How do I call {}?"),
    "source": ("Show me the source of {}.", "How is {} written?"),
    "topic": ("Explain {}.", "What is {}?", "Tell me about {}."),
}
SMALL_TALK = (
    (
        ("Hello!", "Hello", "Hi", "Hi there!", "Good morning.", "Hey, how are you?"),
        "Hello! I am a tiny language model. Ask me about Python's standard library.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Which model is this?"),
        "I am a tiny language model, trained on Python's standard library to test a server.",
    ),
    (
        ("What can you do?", "Help me.", "How can you help me?", "What do you know?"),
        "I can say what a part of Python's standard library does. I am small: check what I say.",
    ),
    (("Thanks!", "Thank you.", "Thank you very much!", "Great, thanks."), "You are welcome."),
    (("Goodbye.", "Bye!", "See you."), "Goodbye!"),
)


def sources() -> dict[str, str]:
    """Path inside the standard library → text of the file, sorted by path."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {}
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        skipped = (
            SKIPPED_FOLDERS.intersection(path.parts)
            or path.as_posix() in SKIPPED_FILES
            or path.parts[0].startswith(SKIPPED_PREFIXES)
        )
        text = "" if skipped else file.read_text(encoding="utf-8")
        if text.strip():
            found[path.as_posix()] = text
    return found


def topics() -> dict[str, str]:
    """Name → help text, as `help("with")` prints it."""
    file = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            return dict(ast.literal_eval(node.value))
    raise ValueError(f"{file.name} assigns no topics")


def documents() -> tuple[list[str], list[str]]:
    """Plain documents: (to train on, held out). The help topics, the only prose, count twice."""
    files = sources()
    held_out = [text for path, text in files.items() if path in HELD_OUT]
    train = [text for path, text in files.items() if path not in HELD_OUT]
    return train + 2 * list(topics().values()), held_out


def conversations(seed: int) -> list[list[Turn]]:
    """Questions and answers made from the same text, as chat messages."""
    rng = random.Random(seed)
    pairs = [pair for path, text in sources().items() for pair in _about_module(path, text, rng)]
    for title, body in map(_title_and_body, topics().values()):
        pairs += [(question.format(title), body) for question in QUESTIONS["topic"]]
    for questions, answer in SMALL_TALK:
        pairs += 8 * [(question, answer) for question in questions]
    rng.shuffle(pairs)

    made = []
    while pairs:
        turns: list[Turn] = []
        if rng.random() < 0.25:
            turns.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for _ in range(rng.choice((1, 1, 1, 2))):
            if pairs:
                question, answer = pairs.pop()
                turns.append({"role": "user", "content": question})
                turns.append({"role": "assistant", "content": answer})
        made.append(turns)
    return made


def _about_module(path: str, text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    name = PUBLIC_NAMES.get(parts[0], ".".join(parts))
    if path in HELD_OUT or name.startswith(NO_QUESTIONS) or re.search(r"(^|\.)_", name):
        return
    tree = ast.parse(text)
    if doc := _first_paragraph(tree):
        for question in QUESTIONS["module"]:
            yield question.format(name), doc
    for full_name, node in _definitions(tree, name):
        doc = _first_paragraph(node)
        if not doc:
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        for question in rng.sample(QUESTIONS[kind], 2):
            yield question.format(full_name), doc
        if isinstance(node, ast.ClassDef):
            continue
        if rng.random() < 0.3:
            call = f"{full_name}({ast.unparse(node.args)})"
            yield rng.choice(QUESTIONS["signature"]).format(full_name), f"`{call}`"
        code = inspect.cleandoc("\n" + (ast.get_source_segment(text, node, padded=True) or ""))
        if rng.random() < 0.3 and len(code) <= MAX_ANSWER:
            asked = rng.choice(QUESTIONS["source"]).format(full_name)
            wanted = "Write a Python function: " + doc.splitlines()[0]
            yield rng.choice((asked, wanted)), f"```python\n{code}\n```"


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Public functions, classes and methods with their full names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            if not child.name.startswith("_"):
                yield f"{prefix}.{child.name}", child
                if isinstance(child, ast.ClassDef):
                    yield from _definitions(child, f"{prefix}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, prefix)


def _first_paragraph(node: Definition | ast.Module) -> str:
    doc = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
    return doc if len(doc) <= MAX_ANSWER else ""


def _title_and_body(topic: str) -> tuple[str, str]:
    """Heading ('the `with` statement') and as many whole paragraphs as an answer may hold."""
    paragraphs = topic.strip().split("\n\n")
    title = paragraphs.pop(0).splitlines()[0].replace('"', "`")
    body = ""
    for paragraph in paragraphs:
        if body and len(body) + len(paragraph) > MAX_ANSWER:
            break
        body += "\n\n" + paragraph
    return title[0].lower() + title[1:], body.strip()
