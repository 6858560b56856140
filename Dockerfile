# Runs `lowbit`:
#   docker build -t lowbit .
#   docker run --rm -v "$PWD:/data" lowbit quantize MODEL OUT --recipe rtn-w4a16-g128
# A base that already has torch saves its download, and decides between CPU and CUDA:
#   docker build -t lowbit --build-arg BASE=pytorch/pytorch .
# Untested: no container engine was at hand where it was written.
ARG BASE=python:3.12-slim
FROM ${BASE}
WORKDIR /lowbit
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY cmake cmake
COPY src src
# The kernels are compiled; without a C compiler, lowbit would run on torch alone.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# Bases on Ubuntu or Debian keep pip out of their own Python otherwise (PEP 668).
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN pip install --no-cache-dir '.[eval]'
RUN useradd --create-home lowbit
USER lowbit
WORKDIR /data
ENTRYPOINT ["lowbit"]
