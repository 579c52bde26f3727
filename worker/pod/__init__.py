"""The development leg: sshd and JupyterLab on a GPU pod."""
