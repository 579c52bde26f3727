# Bases for the engines that are no part of vLLM's images. The Dockerfile of this repository is built
# upon one of these stages as it is upon vLLM's image; docker-bake.hcl does both:
#
#   docker buildx bake llama-cpu-bundled          # GGUF=org/name:Q4_K_M names the model
#
# Only llama-cpu has been run by the tests. The others need a GPU; they are written from their
# makers' own images and documentation.

# The build that Debian's packages below are of: both roles of RPC must be of the same one.
ARG LLAMA_BUILD=b11669
# cuda or rocm
ARG LLAMA_GPU=cuda
ARG DEBIAN=debian:forky-slim
ARG TABBY=ghcr.io/theroyallab/tabbyapi:latest
ARG CUDA=nvidia/cuda:12.8.1-devel-ubuntu24.04

# llama.cpp on CPUs: Debian's packages, RPC in both roles included -------------------------------
FROM ${DEBIAN} AS llama-cpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-pip \
    llama.cpp-tools llama.cpp-tools-extra libggml0-backend-rpc \
 && rm -rf /var/lib/apt/lists/* \
 && ln -s /usr/libexec/*/llama/bin/ggml-rpc-server /usr/local/bin/

# llama.cpp on GPUs: upstream's server image, and RPC, which it lacks, from the same source -------
# hadolint ignore=DL3006
FROM ubuntu:24.04 AS llama-rpc
ARG LLAMA_BUILD
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential ca-certificates cmake git \
 && rm -rf /var/lib/apt/lists/* \
 && git clone --depth 1 --branch "${LLAMA_BUILD}" https://github.com/ggml-org/llama.cpp /source \
 && cmake -S /source -B /build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON \
    -DGGML_RPC=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
 && cmake --build /build -j --target ggml-rpc ggml-rpc-server

FROM ghcr.io/ggml-org/llama.cpp:server-${LLAMA_GPU}-${LLAMA_BUILD} AS llama-gpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-pip \
 && rm -rf /var/lib/apt/lists/*
COPY --from=llama-rpc /build/bin/libggml-rpc.so /build/bin/ggml-rpc-server /app/
ENV PATH=/app:$PATH

# MLC: MODEL is a folder or repository with mlc-chat-config.json, the weights and one compiled *.so --
FROM ${CUDA} AS mlc
# What MLC's wheels are called for this platform: cu128, rocm62, ...
ARG MLC=cu128
ENV ENGINE=mlc
# hadolint ignore=DL3008,DL3013
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-pip \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m pip install --no-cache-dir --break-system-packages --pre \
    --find-links https://mlc.ai/wheels "mlc-llm-nightly-${MLC}" "mlc-ai-nightly-${MLC}"

# TabbyAPI: MODEL is an EXL3 folder or repository ---------------------------------------------------
FROM ${TABBY} AS tabby
ENV ENGINE=tabby
RUN printf '#!/bin/sh\ncd /app && exec python3 main.py "$@"\n' >/usr/local/bin/tabbyapi \
 && chmod +x /usr/local/bin/tabbyapi
