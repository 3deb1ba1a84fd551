"""Downloads against a local server that cuts connections, alters bytes, ignores ranges, or is not there."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from alro_fast.data.sources import download as module
from alro_fast.data.sources.download import ARCHIVES, LICENCES, Archive, cache_folder, download, fetch, unpack
from alro_fast.data.sources.interactions import MOVIELENS
from alro_fast.data.sources.readers import FOLDERS
from alro_fast.errors import AlroFastError

RATINGS = b"1\t2\t3\t4\n" * 40_000
ITEMS = bytes(range(256)) * 500


def archive_bytes(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in members.items():
            packed.writestr(name.replace("__", "/").replace("_", "."), content)
    return buffer.getvalue()


CONTENT = archive_bytes(**{"ml-100k__u_data": RATINGS, "ml-100k__u_item": ITEMS, "ml-100k__README": b"terms"})


class Server:
    """Serves `content`; `cut_after` bytes of an answer it closes the connection, `cuts` times."""

    def __init__(self, content: bytes = CONTENT, *, cut_after=0, cuts=0, ranges=True, status=200):
        self.content, self.cut_after, self.cuts, self.ranges, self.status = content, cut_after, cuts, ranges, status
        self.requests: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/ml-100k.zip"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers["Range"]
        self.requests.append(asked)
        if self.status != 200:
            handler.send_error(self.status)
            return
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if first >= len(self.content):
            handler.send_error(416)
            return
        body = self.content[first:]
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(self.content) - 1}/{len(self.content)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if self.cuts:
            self.cuts -= 1
            body = body[: self.cut_after]
        handler.wfile.write(body)

    def __enter__(self) -> Server:
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def archives(url: str, content: bytes = CONTENT) -> dict[str, Archive]:
    checksums = {"md5": hashlib.md5(content).hexdigest(), "sha256": hashlib.sha256(content).hexdigest()}
    return {"ml-100k": Archive(url, len(content), checksums, ("ml-100k/u.data", "ml-100k/u.item"))}


def get(server: Server, folder, *, accept_licence=True, attempts=3):
    lines: list[str] = []
    table = archives(server.url)
    quick = {"attempts": attempts, "wait_s": 0, "report": lines.append}
    download("ml-100k", folder, accept_licence=accept_licence, archives=table, **quick)
    return lines


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_download_shows_the_licence_and_leaves_the_files_only(tmp_path):
    with Server() as server:
        lines = get(server, tmp_path / "cache" / "ml-100k")
        folder = tmp_path / "cache" / "ml-100k"
        assert names(folder) == ["u.data", "u.item"]
        assert (folder / "u.data").read_bytes() == RATINGS
        assert (folder / "u.item").read_bytes() == ITEMS
        assert "no commercial use" in lines[0]
        assert LICENCES["ml-100k"].url in lines[0]
        get(server, folder, accept_licence=False)  # at hand: nothing to accept, nothing to fetch
        assert server.requests == [None]


def test_without_acceptance_no_byte_is_asked_for(tmp_path):
    with Server() as server:
        with pytest.raises(AlroFastError, match="--accept_licence"):
            get(server, tmp_path, accept_licence=False)
        assert server.requests == []
        assert names(tmp_path) == []


def test_cut_connections_are_resumed_where_they_broke(tmp_path):
    step = len(CONTENT) // 4
    with Server(cut_after=step, cuts=3) as server:
        lines = get(server, tmp_path)
        assert server.requests == [None, *(f"bytes={k * step}-" for k in (1, 2, 3))]
    assert (tmp_path / "u.data").read_bytes() == RATINGS
    assert names(tmp_path) == ["u.data", "u.item"]
    assert sum("trying to go on" in line for line in lines) == 3


def test_a_server_that_keeps_cutting_leaves_a_part_for_the_next_run(tmp_path):
    with Server(cut_after=1000, cuts=1) as server:
        server.cut_after, server.cuts = 1000, 1
        original = server.answer

        def once_then_nothing(handler):
            if server.requests:
                server.status = 503
            original(handler)

        server.answer = once_then_nothing
        with pytest.raises(AlroFastError, match=r"503.*1,000 of [\d,]+ bytes are kept"):
            get(server, tmp_path, attempts=2)
        assert names(tmp_path) == ["ml-100k.zip.part"]
        server.answer, server.status = original, 200
        get(server, tmp_path)
        assert server.requests[-1] == "bytes=1000-"
    assert (tmp_path / "u.item").read_bytes() == ITEMS


def test_altered_bytes_never_get_a_name(tmp_path):
    middle = len(CONTENT) // 2
    altered = CONTENT[:middle] + bytes([CONTENT[middle] ^ 1]) + CONTENT[middle + 1 :]
    with Server(altered) as server:
        with pytest.raises(AlroFastError, match=r"not the published archive \(its md5 is"):
            get(server, tmp_path)
        assert names(tmp_path) == []
        assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["md5", "sha256"])
def test_every_checksum_must_match(tmp_path, name):
    with Server() as server:
        good = archives(server.url)["ml-100k"]
        checksums = dict(good.checksums) | {name: "0" * len(good.checksums[name])}
        with pytest.raises(AlroFastError, match=f"its {name} is"):
            fetch(server.url, tmp_path / "a.zip", good.size, checksums, report=print)
        assert names(tmp_path) == []


def test_a_spoilt_part_of_an_earlier_run_is_fetched_again(tmp_path):
    (tmp_path / "ml-100k.zip.part").write_bytes(b"not the archive")
    with Server() as server:
        lines = get(server, tmp_path)
        assert server.requests == ["bytes=15-", None]
    assert any("from its beginning" in line for line in lines)
    assert (tmp_path / "u.data").read_bytes() == RATINGS


def test_a_part_longer_than_the_archive_is_not_continued(tmp_path):
    (tmp_path / "ml-100k.zip.part").write_bytes(bytes(len(CONTENT) + 1))
    with Server() as server:
        get(server, tmp_path)
        assert server.requests == [None]
    assert names(tmp_path) == ["u.data", "u.item"]


def test_a_server_without_ranges_starts_over(tmp_path):
    with Server(cut_after=1000, cuts=1, ranges=False) as server:
        get(server, tmp_path)
        assert server.requests == [None, "bytes=1000-"]
    assert (tmp_path / "u.data").read_bytes() == RATINGS


def test_a_shorter_and_a_longer_file_are_refused(tmp_path):
    with Server(CONTENT[:-10]) as server, pytest.raises(AlroFastError, match="could not be downloaded"):
        get(server, tmp_path)
    with Server(CONTENT + b"tail") as server, pytest.raises(AlroFastError, match=r"bytes instead of"):
        get(server, tmp_path / "other")
    assert names(tmp_path / "other") == []


def test_missing_page_is_asked_for_once(tmp_path):
    with Server(status=404) as server:
        with pytest.raises(AlroFastError, match="the server answers 404"):
            get(server, tmp_path)
        assert len(server.requests) == 1


def test_no_server(tmp_path):
    with Server() as server:
        pass
    with pytest.raises(AlroFastError, match=r"could not be downloaded.*--raw_dir"):
        get(server, tmp_path)
    assert names(tmp_path) == []


def test_archives_without_the_expected_members(tmp_path):
    packed = tmp_path / "x.zip"
    packed.write_bytes(archive_bytes(other=b""))
    with pytest.raises(AlroFastError, match="cannot be unpacked"):
        unpack(packed, ("ml-100k/u.data",), tmp_path)
    packed.write_bytes(b"no zip")
    with pytest.raises(AlroFastError, match="cannot be unpacked"):
        unpack(packed, ("ml-100k/u.data",), tmp_path)
    assert names(tmp_path) == ["x.zip"]


def test_data_without_a_published_checksum_are_not_downloaded(tmp_path):
    with pytest.raises(AlroFastError, match=r"amazon-2023 has no published checksum.*amazon-reviews-2023.*--raw_dir"):
        download("amazon-2023", tmp_path, accept_licence=True)


def test_table_of_archives():
    assert set(ARCHIVES) == set(MOVIELENS)
    for name, archive in ARCHIVES.items():
        assert archive.url == f"https://files.grouplens.org/datasets/movielens/{name}.zip"
        assert archive.members == tuple(f"{name}/{file}" for file in FOLDERS[name][:2])
        assert archive.checksums
        for algorithm, digest in archive.checksums.items():
            assert len(digest) == 2 * hashlib.new(algorithm).digest_size
            int(digest, 16)
        assert LICENCES[name].url.startswith(module.BASE)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("ml-1m") == tmp_path / "alro_fast" / "ml-1m"
