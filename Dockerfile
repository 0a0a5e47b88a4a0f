# An image with halfstep and the packages of the lock. It works in /work.
#   docker build -t halfstep .
#   docker run --rm -v "$PWD:/work" halfstep run --preset laptop
# For NVIDIA GPUs, whose libraries come with PyPI's build of torch:
#   docker build -t halfstep:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm --gpus all -v "$PWD:/work" halfstep:cuda run --preset docs
ARG PYTHON=3.11
FROM docker.io/library/python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
COPY envs/requirements.txt envs/
RUN pip install --index-url "$TORCH_INDEX" \
    "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' envs/requirements.txt)"
RUN pip install --no-deps --require-hashes -r envs/requirements.txt
COPY pyproject.toml README.md LICENSE Snakefile config.yaml ./
COPY envs envs
COPY rules rules
COPY workflow workflow
COPY src src
RUN pip install --no-deps .

# Any user may run it (docker run --user "$(id -u)"), also one whom the image does not know.
ENV HOME=/tmp USER=halfstep NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["halfstep"]
CMD ["--help"]
