# Serves the bundled students on CPU: the wheel's Triton on loopback, the gateway on port 8000.
#   docker build -t fewstep . && docker run --rm --init -p 127.0.0.1:8000:8000 --shm-size=256m -e FEWSTEP_ALLOW_NO_KEYS=true fewstep
# Inside the container it listens on every address, so it wants keys (-v FOLDER:/keys -e FEWSTEP_KEYS_FILE=/keys/keys.json,
# readable by user fewstep) or, as above with a port that only this machine reaches, to be told that it shall do without.
FROM python:3.11-slim

# Of the same interpreter that Triton's stub embeds; nothing is compiled and no system package is needed.
WORKDIR /opt/fewstep
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

COPY pyproject.toml README.md fewstep.py ./
COPY server server
COPY benchmarks benchmarks
COPY model_repository model_repository
RUN pip install --editable '.[triton]' && useradd --create-home fewstep && install -d -o fewstep /jobs
USER fewstep

# Video jobs and their files outlive the container with -v jobs:/jobs.
ENV FEWSTEP_JOBS_FOLDER=/jobs
VOLUME /jobs

EXPOSE 8000
# Alive and able to draw: /readyz asks every student for a picture.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=12)"]
# SIGTERM reaches fewstep itself, which ends Triton before it exits.
CMD ["fewstep", "serve", "--host", "0.0.0.0", "--port", "8000"]
