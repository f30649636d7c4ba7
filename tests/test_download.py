"""Downloads from a server on this machine: whole or not at all, and one line when they fail."""

import http.server
import threading
from pathlib import Path

import gdown
import pytest

from posterior_matching.data.cache import fetch

CONTENT = bytes(range(256)) * 400


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        if self.server.status != 200:
            return self.send_error(self.server.status)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: self.server.sent])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.status, server.sent = 0, 200, len(CONTENT)
        server.url = f"http://127.0.0.1:{server.server_port}/file.zip"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_is_downloaded_once_and_whole(server, tmp_path, capfd):
    path = tmp_path / "manual" / "file.zip"
    for status, sent in ((404, 0), (200, 1000)):
        server.status, server.sent = status, sent
        with pytest.raises(ConnectionError, match=r"^(HTTP|ChunkedEncoding)Error$"):
            fetch(server.url, path)
        assert not list(path.parent.iterdir())
    server.sent = len(CONTENT)
    fetch(server.url, path)
    fetch(server.url, path)
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path] and server.requests == 3
    assert capfd.readouterr() == ("", "")


def test_google_drive_is_asked_by_gdown(monkeypatch, tmp_path):
    monkeypatch.setattr(gdown, "download", lambda url, output: Path(output).write_text(url))
    fetch("https://drive.google.com/uc?id=1", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "https://drive.google.com/uc?id=1"
