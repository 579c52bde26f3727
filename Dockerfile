# One image, three legs: MODE_TO_RUN chooses what a container of it runs.
#
#   docker build -t tripod --build-arg MODEL=org/name --secret id=HF_TOKEN,env=HF_TOKEN .
#
# The layers are those of the code: what changes daily comes last, so that an edit of worker/
# never fetches weights again. The base brings python3 with vLLM; docker-bake.hcl names the bases.
ARG BASE_IMAGE=vllm/vllm-openai:v0.32.0
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# 1  system and Python packages ----------------------------------------------------------------
# sshd's host keys are made when a pod first starts: no two may share them.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends openssh-server tini \
 && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

# image.txt is complete and pinned. What the base has already stays as it is, so that vLLM keeps
# the versions it was built with; only what is lacking is installed. For an index of your own:
# --secret id=pip.conf,src=...
COPY requirements/image.txt /tripod/requirements.txt
RUN --mount=type=secret,id=pip.conf \
    export PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_BREAK_SYSTEM_PACKAGES=1 \
 && packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
 && python3 -m pip list --disable-pip-version-check --path "$packages" --format=freeze \
    | sed 's/=.*//; s/[._]/-/g; s/.*/^&==/' >/tmp/present \
 && grep -ivf /tmp/present /tripod/requirements.txt >/tmp/lacking \
 && python3 -m pip install --disable-pip-version-check --no-cache-dir --no-deps \
    --ignore-installed --root-user-action=ignore -r /tmp/lacking \
 && rm /tmp/present /tmp/lacking \
 && python3 -c 'import httpx, huggingface_hub, jupyterlab, psutil, pydantic_settings, runpod'

# A start imports some 4,000 files in each of vLLM's processes. uv, which vLLM's image is made with,
# compiles none of them, and PYTHONDONTWRITEBYTECODE would keep them so. Some files are of another
# Python than this one; no module imports those.
RUN python3 -c 'import compileall, site; [compileall.compile_dir(folder, quiet=2, workers=0) \
        for folder in site.getsitepackages()]'

# 2  preload/ ----------------------------------------------------------------------------------
COPY preload/ /tripod/preload/
COPY requirements/openllm.sh requirements/openllm.txt /tripod/requirements/
RUN python3 -m compileall -q /tripod/preload
ENV PYTHONPATH=/tripod
WORKDIR /tripod

# 3  baked weights -----------------------------------------------------------------------------
# An empty MODEL bakes nothing: such an image finds its model when it starts. HF_ENDPOINT names
# another hub. The token stands in no layer: it is mounted while these commands run.
ARG MODEL=mistralai/Mistral-7B-Instruct-v0.1
ARG MODEL_REVISION=
# Without a default: a base that is made for one engine names it itself.
ARG ENGINE
ARG HF_ENDPOINT
# OpenLLM tells what MODEL=openllm:<tag> is; it stays only where it is the engine.
RUN --mount=type=secret,id=HF_TOKEN --mount=type=secret,id=pip.conf \
    mkdir -p /models \
 && case "$ENGINE $MODEL" in openllm\ *|*\ openllm:*) \
        PIP_CONFIG_FILE=/run/secrets/pip.conf sh requirements/openllm.sh ;; \
    esac \
 && if [ -n "$MODEL" ]; then python3 -m preload --into /models; fi \
 && if [ "$ENGINE" != openllm ]; then rm -rf .cache; fi
# The LoRA adapters that it names; the model stays in its own layer when it changes.
ARG ENGINE_ARGS=
RUN --mount=type=secret,id=HF_TOKEN \
    if [ -n "$ENGINE_ARGS" ]; then python3 -m preload --into /models; fi

# 4  worker/ and start.sh ----------------------------------------------------------------------
ARG MODE_TO_RUN=pod
ARG CONCURRENCY_MODIFIER=1
ARG MAX_MODEL_LEN=25000
ENV MODEL=${MODEL} \
    MODEL_REVISION=${MODEL_REVISION} \
    ENGINE=${ENGINE} \
    ENGINE_ARGS=${ENGINE_ARGS} \
    MODE_TO_RUN=${MODE_TO_RUN} \
    CONCURRENCY_MODIFIER=${CONCURRENCY_MODIFIER} \
    MAX_MODEL_LEN=${MAX_MODEL_LEN}
LABEL org.opencontainers.image.title="Tripod" \
      org.opencontainers.image.description="A language model as a Runpod worker: serverless, pod or both" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      tripod.model="${MODEL}" \
      tripod.model-revision="${MODEL_REVISION}"
EXPOSE 22 8000 8888

# A container ends with its worker, so a serverless one that runs is healthy; the others have a
# port to ask. An engine may take long to load: only after 20 minutes does a failure count.
HEALTHCHECK --interval=30s --timeout=10s --start-period=20m --retries=3 \
    CMD ["bash", "-c", "case $MODE_TO_RUN in pod|both) : </dev/tcp/127.0.0.1/8888 ;; api) exec 3<>/dev/tcp/127.0.0.1/${PORT_HEALTH:-${PORT:-8000}} && printf 'GET /ping HTTP/1.0\\r\\n\\r\\n' >&3 && grep -q ' 200 ' <&3 ;; esac"]

COPY start.sh /tripod/start.sh
COPY worker/ /tripod/worker/
RUN python3 -m compileall -q /tripod/worker
ENTRYPOINT ["tini", "--", "/tripod/start.sh"]
CMD []
