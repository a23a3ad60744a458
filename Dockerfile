# For GPU nodes:  docker build -t memoryformer . && docker run --gpus all --ipc=host -v "$PWD:/workspace" memoryformer --help
# (as your own user: add --user "$(id -u):$(id -g)").
ARG BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime
FROM ${BASE}

# The base keeps its packages in the system's Python, which Debian marks as its own (PEP 668).
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# g++ is for the C++ operation on CPUs; gcc and Python.h are for the launchers that Triton compiles when a run starts, and
# no -runtime base has them. The last line fails where the headers are of another Python than the base's.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ python3-dev && rm -rf /var/lib/apt/lists/* \
 && gcc --version && test -f "$(python -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')/Python.h"

WORKDIR /opt/memoryformer
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY mf_train mf_train
COPY configs configs
COPY tokenizer tokenizer
# The tested versions, but the base's torch: with its own version as the constraint, pip leaves it alone.
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
 && python -c 'import torch; print(f"torch=={torch.__version__}")' >> /tmp/constraints.txt \
 && pip install -c /tmp/constraints.txt '.[train,standalone]' \
 && python -c 'import torch; assert torch.version.cuda, "pip replaced the CUDA build of torch"' \
 && rm /tmp/constraints.txt
COPY launch launch

RUN useradd --create-home --shell /bin/bash trainer && mkdir -p /workspace && chown trainer /workspace
USER trainer
WORKDIR /workspace
ENTRYPOINT ["memoryformer"]
CMD ["--help"]
