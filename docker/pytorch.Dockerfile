# Workers of PyTorch: libraries from requirements/pytorch.txt, pinned by hash, and the package of this checkout.
# BASE_IMAGE is a Debian with python3.11, its venv module and its headers; docs/containers.md says how it was built without a registry.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG LOCK=pytorch
# Also the date of what is compiled: Python then writes bytecode that is checked by hash and holds no time.
ARG SOURCE_DATE_EPOCH=1767225600
WORKDIR /build
COPY requirements/${LOCK}.txt requirements.txt
RUN python3.11 -m venv /opt/triptych \
    && /opt/triptych/bin/pip install --no-cache-dir --require-hashes --only-binary :all: --requirement requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
# The sources become a package without an index; then pip goes, so that nothing can be installed at run time.
RUN /opt/triptych/bin/pip install --no-cache-dir --no-index --no-deps --no-build-isolation . \
    && /opt/triptych/bin/pip uninstall --yes pip

FROM ${BASE_IMAGE}
# torch.compile writes C++ and compiles it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
COPY --from=build /opt/triptych /opt/triptych
# Places of shared volumes, writable by whatever user the container runs as; the root file system may be read-only.
RUN install --directory --mode=1777 /triptych/runs /triptych/hosts
ENV PATH=/opt/triptych/bin:$PATH HOME=/tmp USER=triptych PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /triptych
USER 1000:1000
ENTRYPOINT ["triptych"]
CMD ["worker", "pytorch", "--listen", "/triptych/hosts/pytorch.sock"]
