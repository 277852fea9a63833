# The lab's server in a container:
#   docker build -f Dockerfile -t <dockerhub-user>/mtls-server:latest .
#   docker run -d --rm --name mtls-server -p 8443:8443 <dockerhub-user>/mtls-server:latest
# This image carries the server's private key. Before you push it, read "Docker" in server/README.md.

# Pinned to the minor version: each build gets security fixes, but not a new Python.
FROM python:3.13-slim

# All interfaces, because traffic to a published port does not arrive on the container's loopback.
# No bytecode: the file system may be read-only. Unbuffered: docker logs shows lines as they are
# printed.
ENV MTLS_SERVER_HOST=0.0.0.0 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /mtls-lab

# One by one, so that nothing else can slip in: not ca.key, which can sign a certificate for any
# name, and no file of the client. Only the server's user can read its key.
COPY --chmod=0444 server/server.py server/server.py
COPY --chmod=0444 server/certificates.py server/certificates.py
COPY --chmod=0444 server/connections.py server/connections.py
COPY --chmod=0444 server/event_loop.py server/event_loop.py
COPY --chmod=0444 server/log.py server/log.py
COPY --chmod=0444 server/problems.py server/problems.py
COPY --chmod=0444 server/strict_http.py server/strict_http.py
COPY --chmod=0444 certs/ca.crt certs/ca.crt
# "not found"? Make the certificates first, then build again: bash certs/gen_certs.sh
COPY --chmod=0444 certs/server.crt certs/server.crt
COPY --chown=10001:10001 --chmod=0400 certs/server.key certs/server.key

# Not root, and a number: a user name would need an entry in the image's /etc/passwd, and
# Kubernetes' runAsNonRoot can check only numbers.
USER 10001:10001

EXPOSE 8443

# Exec form: python itself is process 1, and receives the SIGTERM from docker stop.
CMD ["python3", "server/server.py"]
