# The agent for containers. `make image` builds it; the chart in helm/ runs it. Plain: for kernels with BTF. With
# `--target bcc`: for those without as well, and larger by the compiler that they need.

# Debian 12 or later, for whatever architecture the builder is.
ARG BASE=debian:bookworm-slim
ARG VERSION=0.1.0

FROM ${BASE} AS python
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates libbpf1 python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/*.log

FROM python AS build
ARG VERSION
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        clang llvm libbpf-dev linux-libc-dev python3-venv
WORKDIR /src
COPY . .
# An index of one's own and its certificates go in as secrets, since those do not stay in the image.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv /opt/build \
    && /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir dist . \
    && { test -e dist/tcpio_otel-${VERSION}-*.whl || { echo "this is not version ${VERSION}: $(ls dist)"; exit 1; }; } \
    && python3 -m venv --without-pip /opt/tcpio-otel \
    && /opt/build/bin/pip --python /opt/tcpio-otel/bin/python install --no-cache-dir "$(echo dist/*.whl)[kubernetes]" \
    # What packages bring for their own developers, and a second client, by asyncio, as large as the one that is used.
    && find /opt/tcpio-otel \( -name tests -o -name include -o -name '*.[ah]' -o -path '*/kubernetes/aio' \) \
        -prune -exec rm -r {} +

FROM python AS agent
ARG VERSION
LABEL org.opencontainers.image.title="tcpio-otel" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-only"
COPY --from=build /opt/tcpio-otel /opt/tcpio-otel
ENV PATH="/opt/tcpio-otel/bin:${PATH}"
# Container runtimes give capabilities to user 0 only; the agent drops them once the probe is attached.
USER 0
ENTRYPOINT ["tcpio-otel"]
CMD ["run"]

FROM agent AS bcc
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        linux-libc-dev python3-bpfcc \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/*.log
# BCC lays out headers before it compiles: runtimes give this to containers whose root is read-only, too.
ENV TMPDIR=/dev/shm
LABEL org.opencontainers.image.description="Every TCP packet of a host by OTLP; for kernels with BTF, and by BCC for others"

# What comes last is built where no target is named.
FROM agent AS libbpf
LABEL org.opencontainers.image.description="Every TCP packet of a host by OTLP; for kernels with BTF"
