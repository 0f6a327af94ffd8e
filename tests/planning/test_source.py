"""A model's configuration from the disk, the cache of the hub, and the hub: a server of this test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from hycluster.errors import SettingsError
from hycluster.planning.source import source_config

CONFIG = {"model_type": "llama"}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = {
            "/org/there/resolve/main/config.json": 200,
            "/org/odd/resolve/main/config.json": 200,
            "/org/gated/resolve/main/config.json": 403,
        }.get(self.path, 404)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"[]" if "odd" in self.path else json.dumps(CONFIG).encode())

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.05,))
        serving.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield
        server.shutdown()
        serving.join()


def test_the_hub_is_asked_for_what_no_folder_and_no_cache_has(hub: None) -> None:
    assert source_config("org/there", "MODEL") == CONFIG


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("org/none", "MODEL: 'org/none': http://127.0.0.1:[0-9]+ has no such model, or no config.json in it"),
        ("org/gated", "does not let you read it; HF_TOKEN says who you are"),
        ("org/odd", "is no JSON object"),
    ],
)
def test_what_the_hub_refuses_is_named(hub: None, source: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        source_config(source, "MODEL")


def test_without_a_hub_the_error_says_where_was_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match=rf"not in the Hugging Face cache \({tmp_path}\), and .* can't be reached"):
        source_config("org/model", "MODEL")


def test_the_cache_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    assert source_config("org/model", "MODEL") == CONFIG


def test_a_near_miss_of_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "deployment.yaml").touch()
    with pytest.raises(SettingsError, match=r"no such file or folder \(did you mean .*deployment\.yaml'\?\)"):
        source_config(str(tmp_path / "deploymnet.yaml"), "MODEL")
