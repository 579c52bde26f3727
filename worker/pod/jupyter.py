"""JupyterLab over /workspace, by a token."""

from __future__ import annotations

import logging
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from worker.pod.session import session_environment
from worker.processes import Child
from worker.settings import Settings

log = logging.getLogger(__name__)

WORKSPACE = Path("/workspace")
JUPYTER_PORT = 8888


def service(settings: Settings, environment: Mapping[str, str]) -> Child | None:
    """JupyterLab, prepared; None where it can't run, which the log says in one line."""
    WORKSPACE.mkdir(exist_ok=True)
    if shutil.which("jupyter-lab", path=environment.get("PATH")) is None:
        log.warning("JupyterLab is off: it is not installed in this image")
        return None
    if settings.jupyter_password:
        token = settings.jupyter_password.get_secret_value()
        log.info("JupyterLab: port %d, the token is JUPYTER_PASSWORD", JUPYTER_PORT)
    else:
        token = secrets.token_urlsafe(24)
        log.info("JupyterLab: port %d, the token is %s", JUPYTER_PORT, token)
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--allow-root",
        "--no-browser",
        "--ip=0.0.0.0",
        f"--port={JUPYTER_PORT}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={WORKSPACE}",
        "--ServerApp.allow_remote_access=True",
        r"--ServerApp.allow_origin_pat=https://.*\.proxy\.runpod\.net",
        '--ServerApp.terminado_settings={"shell_command": ["/bin/bash"]}',
    ]
    # In the environment, so that it stands in no process list.
    inherited = session_environment(environment)
    home = {"HOME": environment.get("HOME", "/root"), "JUPYTER_TOKEN": token}
    return Child("JupyterLab", command, inherited | home)
