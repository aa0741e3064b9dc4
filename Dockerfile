# The same steps as on any machine: the Makefile, with the same lock. CUDA's libraries are in the lock, the driver is the
# host's. README.md says how to build and run this.
FROM debian:12-slim
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
# gcc, g++ and Python's headers are for torch.compile, the certificates for images and data at https://, the
# programs of libjpeg-turbo for data.write_shards --regions.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ gcc git libjpeg-turbo-progs make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# The user of the host whose folders are mounted.
ARG UID=1000
RUN useradd --create-home --shell /bin/bash --uid $UID user \
    && install --directory --owner=user /home/user/repghost
USER user
WORKDIR /home/user/repghost
COPY --chown=user Makefile requirements.lock ./
RUN make .venv/installed
COPY --chown=user . .
CMD ["make", "demo"]
