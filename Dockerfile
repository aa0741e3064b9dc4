# The same steps as on any machine: the Makefile, with the same lock. Build: docker build -t repghost .
# Run: docker run --gpus all --ipc host -v SHARDS:/shards:ro -v $PWD/outputs:/home/user/repghost/outputs repghost \
#          .venv/bin/python train.py width=1.0 data.root=/shards trainer=gpu
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04
# gcc, g++ and Python's headers are for torch.compile.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --shell /bin/bash user
USER user
WORKDIR /home/user/repghost
COPY --chown=user Makefile requirements.lock ./
RUN make .venv/installed
COPY --chown=user . .
CMD ["make", "demo"]
