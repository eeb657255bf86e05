# CPU:   docker build -t vae3d .
# CUDA:  docker build -t vae3d --build-arg TORCH=cu128 .         and run with --gpus all
#
#     docker run --rm --user "$(id -u)" -v "$PWD:/workspace" vae3d demo-data data/demo
#     docker run --rm --user "$(id -u)" -v "$PWD:/workspace" vae3d train --config demo --data.root data/demo --out_dir runs/demo
#     docker run --rm --user "$(id -u)" -v "$PWD:/workspace" vae3d evaluate --checkpoint runs/demo --data.root data/demo --out_dir out
#
# With several GPUs give --ipc=host, and --entrypoint torchrun for one rank a GPU.
FROM python:3.11-slim

# A folder of download.pytorch.org/whl: cpu, or the CUDA that the driver has.
ARG TORCH=cpu
WORKDIR /opt/vae3d
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --index-url "https://download.pytorch.org/whl/${TORCH}" torch
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY configs configs
COPY loaders loaders
COPY vae3d vae3d
RUN pip install --no-cache-dir -c constraints.txt '.[demo,formats,blosc2,tensorboard]'

# Any user may run it: caches and logins of libraries go where all may write.
ENV HOME=/tmp VAE3D_CACHE=/workspace/.cache/vae3d PYTHONUNBUFFERED=1
WORKDIR /workspace
USER 1000
ENTRYPOINT ["vae3d"]
CMD ["--help"]
