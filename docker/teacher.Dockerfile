# syntax=docker/dockerfile:1
# The teacher server: gRPC on 50051, HTTP on 8080.
#   docker build -f docker/teacher.Dockerfile -t driftline-teacher:cpu .
#   docker build -f docker/teacher.Dockerfile -t driftline-teacher:cuda \
#     --build-arg EXTRA=cuda --build-arg TORCH_INDEX= .
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Extra of pyproject.toml that brings vLLM: cpu or cuda.
ARG EXTRA=cpu
# Index of torch alone. The default package index has CUDA builds; empty takes those.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/driftline/bin:$PATH
RUN python -m venv /opt/driftline
WORKDIR /src

# Requirements before sources, so that a change of code does not install torch again.
COPY pyproject.toml ./
COPY proto/pyproject.toml proto/
RUN python -c "import tomllib; \
ours, client = (tomllib.load(open(path + 'pyproject.toml', 'rb'))['project'] for path in ('', 'proto/')); \
print(*ours['dependencies'], *client['dependencies'], *ours['optional-dependencies']['${EXTRA}'], sep='\n')" \
    | grep -v '^driftline-client' > requirements.txt
# torch first: otherwise vLLM's own requirement takes it from the default index.
RUN grep '^torch==' requirements.txt \
    | xargs pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
# vLLM's CPU build brings CUDA builds of these three, which break `import transformers` on a CPU torch.
RUN pip install -r requirements.txt \
    && if [ "$EXTRA" = cpu ]; then pip uninstall -y torchvision torchaudio torchcodec; fi

COPY LICENSE README.md ./
COPY proto/ proto/
COPY teacher_server/ teacher_server/
COPY student_trainer/ student_trainer/
RUN pip install --no-deps ./proto .

FROM ${PYTHON_IMAGE}
# A compiler, because torch and triton compile kernels at run time; libnuma for vLLM's CPU build.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# torch looks up the name of its user, so the user needs an entry.
RUN groupadd --gid 65532 driftline \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin \
       driftline \
    && install -d -o 65532 -g 65532 /models
COPY --from=build /opt/driftline /opt/driftline
# Everything that is written at run time goes below /tmp and /models; the root may be read-only.
ENV PATH=/opt/driftline/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HOME=/models \
    XDG_CACHE_HOME=/tmp/cache \
    VLLM_CACHE_ROOT=/tmp/vllm \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    TRITON_CACHE_DIR=/tmp/triton \
    NUMBA_CACHE_DIR=/tmp/numba \
    MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /app
USER 65532:65532
EXPOSE 50051 8080
# `|| exit 1`, because Docker reserves exit code 2, which the probe gives for an unreachable server.
HEALTHCHECK --interval=15s --timeout=10s --start-period=10m --start-interval=5s --retries=3 \
    CMD teacher-server probe --address 127.0.0.1:50051 || exit 1
ENTRYPOINT ["teacher-server"]
CMD ["serve"]
