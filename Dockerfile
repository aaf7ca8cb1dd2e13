# docker build --target cpu -t ds_wsi:cpu .        training and tests without a GPU
# docker build --target cuda -t ds_wsi:cuda .      docker run --gpus all --ipc=private -v DATA:/data ds_wsi:cuda ...
#   docker run -v "$PWD/runs:/work/runs" ds_wsi:cpu python launch/train.py
# Tiles do not pass through /dev/shm: the 64 MB of a container are enough.

# --- what both have: the package's folders, without what is not needed to install ---
FROM scratch AS source
COPY pyproject.toml README.md LICENSE /work/
COPY ds_wsi /work/ds_wsi
COPY ds_configs /work/ds_configs
COPY launch /work/launch

FROM python:3.12-slim AS cpu
# g++ is asked for by DeepSpeed; libaio for activations on a local disk.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libaio-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /work
# torch first, without the CUDA libraries that its default build brings.
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY --from=source /work /work
RUN pip install --no-cache-dir .
ENV OMP_NUM_THREADS=1
CMD ["ds-wsi", "--help"]

# The toolkit's devel image has nvcc, which DeepSpeed's fused optimizers and NVMe spills are built with.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ ninja-build libaio-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
COPY --from=source /work /work
RUN pip install --no-cache-dir .
ENV OMP_NUM_THREADS=4
CMD ["ds-wsi", "--help"]
