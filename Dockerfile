# syntax=docker/dockerfile:1.7
# prism-nemo for GPUs: two Python environments on an NGC PyTorch image. docker/README.md says why two, how to run it, and what of it
# has not been built yet.
#
#   docker build -t prism-nemo .                     both environments
#   docker build -t prism-nemo --target train .      without vLLM
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3

# hadolint ignore=DL3006
FROM ${BASE} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The base holds pip to the versions of its own packages, which are not ours; nothing below may change those.
ENV PIP_CONSTRAINT="" \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1
# Ampere, Hopper, Blackwell. Fewer make the builds quicker.
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0 10.0+PTX"
ARG MAX_JOBS=8


# Megatron's optimizer takes its fused Adam and norm of gradients from Transformer Engine or, without it, from apex: these two build flags
# make that, and the fused layer norm. The rest of apex (fast_layer_norm, xentropy, ...) has no use here. The `apex` of the package index
# is another project.
FROM base AS apex
ARG APEX_COMMIT=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
WORKDIR /src/apex
RUN git init --quiet . \
    && git fetch --quiet --depth 1 https://github.com/NVIDIA/apex.git "${APEX_COMMIT}" \
    && git checkout --quiet FETCH_HEAD
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="${MAX_JOBS}" \
    python3 -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .


# The base's Transformer Engine where megatron-core takes it, otherwise this version, its torch part compiled against the base's torch.
FROM base AS transformer-engine
ARG TE_VERSION=2.11.0
ARG NVTE_CUDA_ARCHS="80;90;100"
COPY docker/te_is_suitable.py /src/
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir /wheels; \
    if ! python3 /src/te_is_suitable.py; then \
        NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="${NVTE_CUDA_ARCHS}" MAX_JOBS="${MAX_JOBS}" \
        python3 -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels \
            "transformer-engine==${TE_VERSION}" "transformer-engine-cu13==${TE_VERSION}" "transformer-engine-torch==${TE_VERSION}"; \
    fi


# Training: on top of the base's packages, its torch among them. `--no-deps`: only what is listed is installed, and torch is not.
FROM base AS train-environment
RUN python3 -m venv --without-pip --system-site-packages /opt/train
COPY docker/train.txt docker/torch_is_the_bases.py /src/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/train/bin/python install --no-deps --ignore-installed --requirement /src/train.txt
RUN --mount=type=bind,from=apex,source=/wheels,target=/apex \
    --mount=type=bind,from=transformer-engine,source=/wheels,target=/te \
    find /apex /te -name '*.whl' -exec python3 -m pip --python /opt/train/bin/python install --no-deps --ignore-installed {} +
RUN /opt/train/bin/python /src/torch_is_the_bases.py


# Rollout servers: vLLM with the torch that it is built for, and nothing of the base's.
FROM base AS serve-environment
RUN python3 -m venv --without-pip /opt/serve
COPY docker/serve.txt /src/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/serve/bin/python install --no-deps --requirement /src/serve.txt


# The project, last: a change of its source leaves the layers above as they are.
FROM base AS project
RUN python3 -m venv --without-pip /opt/build
COPY docker/build.txt /src/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/build/bin/python install --no-deps --requirement /src/build.txt
WORKDIR /src/project
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY conf conf
COPY prism_nemo prism_nemo
# Runs note it as the commit of what runs.
ARG REVISION=unknown
RUN echo "${REVISION}" >prism_nemo/REVISION \
    && python3 -m pip --python /opt/build/bin/python wheel --no-deps --no-build-isolation --wheel-dir /wheels .


FROM base AS train
ARG REVISION=unknown
LABEL org.opencontainers.image.title="prism-nemo" \
      org.opencontainers.image.description="Post-trains Qwen3-VL with SFT, adversarial alignment (PRISM) and RLVR on Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
# Not 1000, which the base may have given away. enroot and apptainer run as whoever calls them.
ARG USER_ID=10001
RUN useradd --create-home --uid "${USER_ID}" --shell /bin/bash prism
COPY --from=train-environment /opt/train /opt/train
RUN --mount=type=bind,from=project,source=/wheels,target=/wheels \
    python3 -m pip --python /opt/train/bin/python install --no-deps --no-cache-dir /wheels/*.whl
COPY --chmod=755 docker/entrypoint /usr/local/bin/
ENV PATH=/opt/train/bin:${PATH} \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1
USER ${USER_ID}
WORKDIR /workspace
HEALTHCHECK --interval=2m --timeout=60s --start-period=1m CMD ["prism-nemo", "doctor", "--quick"]
ENTRYPOINT ["/usr/local/bin/entrypoint"]
CMD ["--help"]


FROM train AS full
ARG USER_ID=10001
USER 0
COPY --from=serve-environment /opt/serve /opt/serve
COPY --chmod=755 docker/serve-python /usr/local/bin/
ENV PRISM_NEMO_SERVE_PYTHON=/usr/local/bin/serve-python
RUN --mount=type=bind,from=project,source=/wheels,target=/wheels \
    python3 -m pip --python /opt/serve/bin/python install --no-deps --no-cache-dir /wheels/*.whl
USER ${USER_ID}
