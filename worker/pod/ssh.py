"""sshd, by the key in PUBLIC_KEY, and what its sessions inherit."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from worker.pod.session import session_environment
from worker.processes import Child
from worker.settings import Settings

log = logging.getLogger(__name__)

KEYS = Path("/etc/ssh/tripod_authorized_keys")
SESSION_ENVIRONMENT = Path("/root/.ssh/environment")

SSHD_OPTIONS = {
    "PermitRootLogin": "prohibit-password",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
    "PubkeyAuthentication": "yes",
    "AuthorizedKeysFile": str(KEYS),
    "PermitUserEnvironment": "yes",
    "UsePAM": "no",
}


def service(settings: Settings, environment: Mapping[str, str]) -> Child | None:
    """sshd, prepared; None where it can't run, which the log says in one line."""
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


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")
