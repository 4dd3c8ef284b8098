import socket

import pytest

from ray_ds.errors import ClusterError
from ray_ds.serve.client import generate, generate_stream, is_endpoint_alive, read_health


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_no_endpoint_is_not_alive() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert read_health(url) is None
    assert not is_endpoint_alive({"url": url, "digest": "0" * 16})
    with pytest.raises(ClusterError, match=rf"endpoint {url} \(no answer: .*\) must be up; run the serve step"):
        generate(url, "Hello")
    with pytest.raises(ClusterError, match="must be up"):
        list(generate_stream(url, "Hello"))


def test_something_that_is_no_endpoint_is_not_alive() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        import threading

        def talk_nonsense() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"SSH-2.0-nonsense\r\n")
            connection.close()

        thread = threading.Thread(target=talk_nonsense)
        thread.start()
        assert read_health(url) is None
        thread.join()
