# docker build --target cpu --build-arg torch_index=URL -t ds_wsi:cpu .        training and tests without a GPU
# docker build --target cuda -t ds_wsi:cuda .      docker run --gpus all --ipc=private -v DATA:/data ds_wsi:cuda ...
#   docker run -v "$PWD/runs:/app/runs" ds_wsi:cpu python launch/train.py
# Tiles do not pass through /dev/shm: the 64 MB of a container are enough.

# --- what both have: the package's folders, without what is not needed to install ---
FROM scratch AS source
COPY pyproject.toml README.md LICENSE /app/
COPY ds_wsi /app/ds_wsi
COPY ds_configs /app/ds_configs
COPY launch /app/launch

FROM python:3.12-slim AS cpu
# g++ is asked for by DeepSpeed; libaio for activations on a local disk.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libaio-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# torch first: from the index that torch_index names, such as that of its builds without CUDA's libraries, which are smaller.
ARG torch_index=
RUN pip install --no-cache-dir torch torchvision ${torch_index:+--index-url "$torch_index"}
COPY --from=source /app /app
RUN pip install --no-cache-dir .
ENV OMP_NUM_THREADS=1
CMD ["ds-wsi", "--help"]

# The toolkit's devel image has nvcc, which DeepSpeed's fused optimizers and NVMe spills are built with.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ ninja-build libaio-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
COPY --from=source /app /app
RUN pip install --no-cache-dir .
ENV OMP_NUM_THREADS=4
CMD ["ds-wsi", "--help"]
