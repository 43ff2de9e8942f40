# Flowstone in a small image: the binary, its configuration, a user of its own.
#
#   docker build -t flowstone .
#   docker run -p 7070:7070 -e FLOWSTONE_LISTEN__CLIENT=0.0.0.0:7070 -e FLOWSTONE_ADVERTISE__CLIENT=localhost:7070 \
#     -e FLOWSTONE_SECURITY__INSECURE=true -v flowstone:/var/lib/flowstone flowstone
#
# docker-compose.yml runs three of them as a cluster.

FROM rust:1.95-slim-trixie AS build
WORKDIR /src
COPY . .
# --version says "unknown" where there is no repository: .dockerignore leaves it out.
RUN cargo build --release --locked -p flowstone-cli && strip -o /flowstone target/release/flowstone

FROM debian:trixie-slim
RUN useradd --system --uid 10001 --user-group --home-dir /var/lib/flowstone --shell /usr/sbin/nologin flowstone \
    && install -d -o flowstone -g flowstone -m 0750 /var/lib/flowstone
COPY --from=build /flowstone /usr/local/bin/flowstone
COPY packaging/broker.toml /etc/flowstone/broker.toml
USER flowstone
VOLUME /var/lib/flowstone
# Clients, peers, admin HTTP.
EXPOSE 7070 7071 7072
STOPSIGNAL SIGTERM
# The broker's own program asks it whether it is ready.
HEALTHCHECK --interval=5s --timeout=6s --start-period=30s --retries=3 \
    CMD ["flowstone", "broker", "--config", "/etc/flowstone/broker.toml", "--check-health"]
ENTRYPOINT ["flowstone"]
CMD ["broker", "--config", "/etc/flowstone/broker.toml"]
