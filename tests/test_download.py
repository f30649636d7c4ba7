"""Downloads from a server that breaks off, changes the file, cannot resume, or does not have it."""

import http.server
import threading

import numpy as np
import pytest
import requests

from posterior_matching.data.download import compare_checksum, fetch, record_checksum
from posterior_matching.errors import UserError

CONTENT = np.random.default_rng(0).bytes(1_000_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves one file under every name; what it does wrong is set from outside."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.ranges = CONTENT, '"one"', True
        self.breaks = []  # for the next requests: how many bytes are sent at most
        self.status = None  # an error
        self.requests = []  # the Range of each
        self.url = f"http://127.0.0.1:{self.server_port}/file.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append(asked)
        assert self.headers["Accept-Encoding"] == "identity"
        if server.status:
            return self.send_error(server.status)
        body, start = server.content, 0
        current = server.etag is not None and self.headers.get("If-Range") == server.etag
        if asked and server.ranges and current:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.etag is not None:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = start + server.breaks.pop(0) if server.breaks else len(body)
        self.wfile.write(body[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "manual" / "file.zip"


def alone(path):
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


def interrupt(server, path, monkeypatch, after=400_000):
    """Ctrl-C in the middle of a download."""
    write = requests.Response.iter_content

    def some(self, size):
        for number, chunk in enumerate(write(self, size)):
            if number * size >= after:
                raise KeyboardInterrupt
            yield chunk

    with monkeypatch.context() as patch, pytest.raises(UserError, match="interrupted: the same command resumes"):
        patch.setattr(requests.Response, "iter_content", some)
        fetch(server.url, path)
    assert not path.exists()
    return path.with_name("file.zip.part").stat().st_size


def test_downloads_once(server, path):
    fetch(server.url, path)
    fetch(server.url, path)
    assert alone(path) == CONTENT and server.requests == [None]


def test_an_interrupted_download_resumes_where_it_stopped(server, path, monkeypatch):
    arrived = interrupt(server, path, monkeypatch)
    assert 400_000 <= arrived < len(CONTENT)
    fetch(server.url, path)
    assert alone(path) == CONTENT and server.requests == [None, f"bytes={arrived}-"]


def test_a_broken_connection_is_resumed_at_once(server, path):
    server.breaks = [300_000, 300_000]
    fetch(server.url, path)
    assert alone(path) == CONTENT and len(server.requests) == 3
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in server.requests[1:]]
    assert 0 < starts[0] <= 300_000 < starts[1] <= 600_000


def test_a_connection_that_brings_nothing_new_is_given_up_and_can_be_resumed(server, path):
    server.breaks = [300_000, 0]
    with pytest.raises(requests.RequestException):
        fetch(server.url, path)
    assert not path.exists() and len(server.requests) == 2
    fetch(server.url, path)
    assert alone(path) == CONTENT and server.requests[2] == server.requests[1]


@pytest.mark.parametrize("change", ["another version", "no ranges", "no version", "shorter"])
def test_what_does_not_fit_together_is_downloaded_again(change, server, path, monkeypatch):
    if change == "no version":
        server.etag = None
    interrupt(server, path, monkeypatch)
    if change == "another version":
        server.content, server.etag = CONTENT[::-1], '"two"'
    if change == "no ranges":
        server.ranges = False
    if change == "shorter":  # of the same version: the server is wrong
        server.content = CONTENT[:1000]
    fetch(server.url, path)
    assert alone(path) == server.content


@pytest.mark.parametrize("status", [403, 404, 503])
def test_refusals_leave_nothing(status, server, path):
    server.status = status
    with pytest.raises(requests.HTTPError, match=str(status)):
        fetch(server.url, path)
    assert not list(path.parent.iterdir()) and len(server.requests) == 1


def test_a_wrong_part_is_refused(server, path, monkeypatch):
    interrupt(server, path, monkeypatch)
    send_header = Handler.send_header

    def skewed(self, name, value):
        send_header(self, name, "bytes 7-8/9" if name == "Content-Range" else value)

    monkeypatch.setattr(Handler, "send_header", skewed)
    with pytest.raises(requests.RequestException, match="wrong part"):
        fetch(server.url, path)
    assert not path.exists()


def test_two_processes_share_one_download(server, path):
    threads = [threading.Thread(target=fetch, args=(server.url, path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone(path) == CONTENT and server.requests == [None]


def test_checksums_are_recorded_and_compared(tmp_path, caplog):
    path = tmp_path / "file.zip"
    path.write_bytes(b"abc")
    digest = compare_checksum(path)
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    record_checksum(path, digest)
    assert compare_checksum(path) == digest
    assert (tmp_path / "file.zip.sha256").read_text() == f"{digest}  file.zip\n"
    path.write_bytes(b"abd")
    with pytest.raises(UserError, match=r"not the file that was used before .*delete 'file\.zip\.sha256'") as error:
        compare_checksum(path)
    assert "\n" not in str(error.value)
    with caplog.at_level("WARNING", logger="absl"):
        record_checksum(tmp_path / "missing" / "file.zip", digest)
    assert "cannot record the checksum" in caplog.text
