"""The development leg: sshd and JupyterLab on a GPU pod, as Runpod's own images set them up."""

from __future__ import annotations

import logging
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from worker.processes import Child
from worker.settings import Settings

log = logging.getLogger(__name__)

WORKSPACE = Path("/workspace")
KEYS = Path("/etc/ssh/tripod_authorized_keys")
SESSION_ENVIRONMENT = Path("/root/.ssh/environment")
JUPYTER_PORT = 8888

SSHD_OPTIONS = {
    "PermitRootLogin": "prohibit-password",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
    "PubkeyAuthentication": "yes",
    "AuthorizedKeysFile": str(KEYS),
    "PermitUserEnvironment": "yes",
    "UsePAM": "no",
}

SECRET_MARKS = ("KEY", "TOKEN", "PASSWORD", "SECRET", "CREDENTIAL")
NEEDED_SECRETS = {"HF_TOKEN"}
"""Secrets that a session does need: `python -m worker try` may have to fetch a gated model."""

OF_THE_SESSION = {"HOME", "USER", "LOGNAME", "SHELL", "TERM", "PWD", "OLDPWD", "SHLVL", "MAIL", "_"}
"""Variables that a login sets by itself."""


def services(settings: Settings, environment: Mapping[str, str]) -> list[Child]:
    """Prepare the pod and return what must be kept running; what can't run is said in one line."""
    WORKSPACE.mkdir(exist_ok=True)
    children = [_sshd(settings, environment), _jupyter(settings, environment)]
    return [child for child in children if child]


def run_hook(name: str) -> None:
    """Run Runpod's `/pre_start.sh` or `/post_start.sh` if the image has one."""
    hook = Path("/", name)
    if hook.is_file():
        code = subprocess.run(["bash", str(hook)], check=False).returncode
        log.log(logging.WARNING if code else logging.INFO, "%s ended with code %d", hook, code)


def session_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What ssh sessions inherit: neither secrets they do not need, nor what a login sets."""
    return {
        name: value
        for name, value in environment.items()
        if name not in OF_THE_SESSION
        and "\n" not in value
        and (name in NEEDED_SECRETS or not any(mark in name.upper() for mark in SECRET_MARKS))
    }


def _sshd(settings: Settings, environment: Mapping[str, str]) -> Child | None:
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if sshd is None:
        log.warning("ssh is off: sshd is not installed in this image")
        return None
    if not settings.public_key:
        log.warning("ssh is off: PUBLIC_KEY is not set")
        return None
    _write_private(KEYS, settings.public_key.strip() + "\n")
    check = subprocess.run(["ssh-keygen", "-l", "-f", KEYS], capture_output=True, check=False)
    if check.returncode:
        log.warning("ssh is off: PUBLIC_KEY is not a public key in OpenSSH's format")
        return None
    subprocess.run(["ssh-keygen", "-A"], check=True, stdout=subprocess.DEVNULL)
    Path("/run/sshd").mkdir(exist_ok=True)
    lines = (f"{name}={value}\n" for name, value in session_environment(environment).items())
    _write_private(SESSION_ENVIRONMENT, "".join(lines))
    options = [part for name, value in SSHD_OPTIONS.items() for part in ("-o", f"{name}={value}")]
    log.info("ssh: root on port 22, by the key in PUBLIC_KEY")
    return Child("sshd", [sshd, "-D", "-e", *options], environment)


def _jupyter(settings: Settings, environment: Mapping[str, str]) -> Child | None:
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


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")
