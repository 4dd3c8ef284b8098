"""A real S3 server on loopback (SeaweedFS), started here with made-up keys; it can be killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pyarrow import fs

BUCKET = "ray-ds-test"
KEY, SECRET = "made-up-writer", "made-up-writer-secret"
READER_KEY, READER_SECRET = "made-up-reader", "made-up-reader-secret"
PORTS = (
    *("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc"),
)


@dataclass
class Server:
    """A store that keeps its files in a folder, under the same address each time it is started."""

    folder: Path
    ports: dict[str, int]
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    def start(self, wait: bool = True) -> None:
        """Start the server and wait until it answers."""
        weed = Path(sys.executable).parent / "weed"
        (self.folder / "data").mkdir(exist_ok=True)
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(weed, f"-config_dir={self.folder}", "server", f"-dir={self.folder}/data"),
                    *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=20", "-master.volumeSizeLimitMB=64"),
                    *("-filer", "-s3", f"-s3.config={self.folder}/keys.json", "-s3.autoCreateBucket=false"),
                    *(
                        "-s3.iam=false",
                        "-master.electionTimeout=500ms",
                        "-master.heartbeatInterval=100ms",
                        "-s3.port.iceberg=0",
                        "-s3.port.lance=0",
                        "-master.telemetry=false",
                    ),
                    *(f"-{name}={port}" for name, port in self.ports.items()),
                ],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until an object can be written."""
        deadline = time.monotonic() + 60
        system = fs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=self.endpoint,
            region="us-east-1",
            allow_bucket_creation=True,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        )
        while True:
            try:
                system.create_dir(BUCKET)
                with system.open_output_stream(f"{BUCKET}/ready") as stream:
                    stream.write(b"ready")
                return
            except OSError:
                assert self.process is not None and self.process.poll() is None, (
                    self.folder / "server.log"
                ).read_text()
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)

    def kill(self) -> None:
        """End the server as when its machine loses power."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def identity(name: str, key: str, secret: str, actions: list[str]) -> dict[str, object]:
    """Return a user as SeaweedFS's configuration has it."""
    return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("store")
    users = [
        identity("writer", KEY, SECRET, ["Admin", "Read", "Write", "List"]),
        identity("reader", READER_KEY, READER_SECRET, ["Read", "List"]),
    ]
    (folder / "keys.json").write_text(json.dumps({"identities": users}))
    (folder / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
    server = Server(folder=folder, ports=dict(zip(PORTS, free_ports(len(PORTS)), strict=True)))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The running server, with its address and a writer's key in the environment, as on a node of a user's cluster."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return running


@pytest.fixture
def folder(server: Server, request: pytest.FixtureRequest) -> str:
    """A folder of the bucket for one test."""
    return f"s3://{BUCKET}/{request.node.name}"
