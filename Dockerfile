# The lab's server in a container:
#   docker build -f Dockerfile -t <dockerhub-user>/mtls-server:latest .
#   docker run -d --rm --name mtls-server -p 8443:8443 <dockerhub-user>/mtls-server:latest
# This image carries the server's private key. Before you push it, read "Docker" in server/README.md.

# Pinned to the minor: security fixes arrive with each build, a new Python only when we say so.
FROM python:3.13-slim

# All interfaces, because Docker's port publishing does not come in over the container's
# loopback. No bytecode: the file system may be read-only. Unbuffered: docker logs shows lines
# as they are printed.
ENV MTLS_SERVER_HOST=0.0.0.0 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /mtls-lab

# One by one, so that nothing else can slip in: no ca.key, which could sign anyone's certificate,
# and nothing of the client's. The key is readable by the server's user alone.
COPY --chmod=0444 server/server.py server/server.py
COPY --chmod=0444 server/certificates.py server/certificates.py
COPY --chmod=0444 server/connections.py server/connections.py
COPY --chmod=0444 server/event_loop.py server/event_loop.py
COPY --chmod=0444 server/log.py server/log.py
COPY --chmod=0444 server/problems.py server/problems.py
COPY --chmod=0444 server/strict_http.py server/strict_http.py
COPY --chmod=0444 certs/ca.crt certs/ca.crt
# "not found"? The certificates are made by: bash certs/gen_certs.sh (run it first, then build)
COPY --chmod=0444 certs/server.crt certs/server.crt
COPY --chown=10001:10001 --chmod=0400 certs/server.key certs/server.key

# Not root, and a number: a user name would need an entry in the image's /etc/passwd, and
# Kubernetes' runAsNonRoot can only judge numbers.
USER 10001:10001

EXPOSE 8443

# Exec form: python is process 1 itself and receives the SIGTERM of docker stop.
CMD ["python3", "server/server.py"]
