"""What ssh and JupyterLab sessions inherit."""

import re

from preload.secret import SECRETS
from tests.support import ROOT
from worker.pod.session import NEEDED, session_environment


def test_sessions_inherit_all_but_the_workers_own_secrets() -> None:
    theirs = {"WANDB_API_KEY": "w", "AWS_SECRET_ACCESS_KEY": "a", "MODEL": "m", "HANDLER": "h"}
    needed = dict.fromkeys(NEEDED, "needed")
    secrets = dict.fromkeys(SECRETS - NEEDED, "secret")
    login = {"HOME": "/root", "PWD": "/", "SHLVL": "1"}
    lines = {"TWO_LINES": "a\nb"}
    assert session_environment(theirs | needed | secrets | login | lines) == theirs | needed


def test_the_how_to_names_what_they_do_not_inherit() -> None:
    page = (ROOT / "docs" / "how-to" / "pod.md").read_text(encoding="utf-8")
    said = page.partition("the worker's own secrets: ")[2].partition(". ")[0]
    assert set(re.findall(r"`(\w+)`", said)) == SECRETS - NEEDED
