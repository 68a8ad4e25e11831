"""Downloads against a server on this machine that cuts, forgets, lies and changes its mind; archives that nobody should
unpack; the command line.
"""
import errno
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import zlib
from pathlib import Path

import py7zr
import pytest
from vggt_lora.core import ConfigError, SceneError
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.download import main
from vggt_lora.files import archive, http as fetch
from vggt_lora.files.archive import Packed, unpack, writers
from vggt_lora.files.http import DownloadError
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes.eth3d_server import KINDS, fetch_scenes
from vggt_lora.scenes.opening import find_scenes, open_scene

ROOT = Path(__file__).resolve().parent.parent


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve `server.files` as a good server does, or as `server.mode` says."""

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        mode, name, asked = self.server.mode, self.path.lstrip("/"), self.headers.get("Range")
        self.server.log.append((self.command, name, asked))
        if send and mode.busy:
            mode.busy -= 1
            return self.head(503)
        if mode.status:
            return self.head(mode.status)
        if name not in self.server.files:
            return self.head(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
        content = self.server.files[name]
        tag = mode.tag or f'"{hashlib.sha256(content).hexdigest()}"'
        extra = {"X-Repo-Commit": "0" * 40} | ({} if mode.tag == "none" else {"ETag": tag})
        start, same = 0, mode.trusting or self.headers.get("If-Range") in (None, tag)
        if asked and mode.ranges and same:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            start, mode.shift = start + mode.shift, 0
            if start >= len(content):
                return self.head(416, **extra, **{"Content-Range": f"bytes */{len(content)}"})
            extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.head(206 if start else 200, **extra, **{"Content-Length": str(len(content) - start + mode.lie)})
        if send:
            self.wfile.write(content[start:][:mode.cut])
            self.wfile.flush()
            if mode.hang:
                mode.hang.wait(600)

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server with files, a mode and a log; `url` is its address."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.log, server.url = {}, [], f"http://127.0.0.1:{server.server_port}"
    server.mode = types.SimpleNamespace(
        cut=None, ranges=True, lie=0, tag=None, trusting=False, shift=0, busy=0, status=0, hang=None
    )
    server.asked = lambda: [entry[2] for entry in server.log if entry[0] == "GET"]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def content():
    return bytes(range(256)) * 1200  # 307,200 bytes


@pytest.fixture
def get(server, content, tmp_path):
    """Fetch x.7z from the server without waiting; what a person is told is kept in `get.told`."""
    server.files["x.7z"] = content

    def call(**options):
        return fetch.fetch(
            f"{server.url}/x.7z",
            tmp_path / "x.7z",
            **{"wait": 0, "progress": False, "say": call.told.append, **options},
        )
    call.told, call.target, call.part = [], tmp_path / "x.7z", tmp_path / "x.7z.part"
    return call


def whole(get, content):
    """Whether the file arrived, and nothing else lies there."""
    return get.target.read_bytes() == content and [p.name for p in get.target.parent.iterdir()] == ["x.7z"]


# --- one file -------------------------------------------------------------------------------------------------------

def test_a_file_arrives_and_is_not_fetched_again(server, get, content):
    get(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    assert whole(get, content) and server.asked() == [None]
    get(size=len(content))
    assert len(server.log) == 1 and get.told[-1] == "x.7z: already there, 307 kB"
    get.target.write_bytes(content[:-1])
    with pytest.raises(DownloadError, match="x.7z: exists already and has 307,199 bytes, expected 307,200"):
        get(size=len(content))


def test_cut_connections_are_continued_where_they_broke(server, get, content):
    server.mode.cut = 120_000
    get()
    assert whole(get, content) and len(server.asked()) == 3
    starts = [int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) for asked in server.asked()[1:]]
    assert 100_000 < starts[0] <= 120_000 and 200_000 < starts[1] <= 240_000, "what had arrived was fetched again"
    assert sum("trying again" in line for line in get.told) == 2


def test_a_later_call_goes_on(server, get, content):
    server.mode.cut = 120_000
    with pytest.raises(
        DownloadError,
        match=r"broke off after 1\d\d kB of 307 kB; gave up after 1 attempt; the received bytes are kept in x.7z.part",
    ):
        get(tries=1)
    kept = get.part.read_bytes()
    assert content.startswith(kept) and len(kept) > 100_000 and not get.target.exists()
    server.mode.cut = None
    get()
    assert whole(get, content) and server.asked() == [None, f"bytes={len(kept)}-"]


@pytest.mark.parametrize("begun", ["whole", "longer", "no note", "another address", "broken note", "empty"])
def test_whatever_lies_there_the_file_comes_out_right(server, get, content, begun):
    server.mode.cut = 120_000
    with pytest.raises(DownloadError):
        get(tries=1)
    server.mode.cut, note = None, get.part.with_name("x.7z.part.json")
    asked_before = len(server.log)
    if begun == "whole":
        get.part.write_bytes(content)
    elif begun == "longer":
        get.part.write_bytes(content + b"more")
    elif begun == "empty":
        get.part.write_bytes(b"")
    elif begun == "no note":
        note.unlink()
    elif begun == "another address":
        note.write_text(json.dumps({**json.loads(note.read_text()), "url": "http://127.0.0.1/other"}))
    else:
        note.write_text("{")
    get()
    assert whole(get, content)
    assert server.asked()[asked_before:] == ([] if begun == "whole" else [None])


@pytest.mark.parametrize(
    "fault",
    [
        "ranges ignored", "weak tag", "no tag", "changed", "changed and unnoticed", "shrunk", "shrunk and unnoticed",
        "another part",
    ],
)
def test_halves_of_two_files_never_meet(server, get, content, fault):
    """The part is dropped wherever the server does not vouch that the rest belongs to it."""
    server.mode.cut = 120_000
    server.mode.tag = {"weak tag": 'W/"1"', "no tag": "none"}.get(fault)
    with pytest.raises(DownloadError):
        get(tries=1)
    assert get.part.stat().st_size > 100_000
    server.mode.cut, server.mode.ranges = None, fault != "ranges ignored"
    if fault.startswith("changed") or "tag" in fault:
        content = content[::-1]
    server.mode.shift = 1000 if fault == "another part" else 0
    if fault.startswith("shrunk"):
        content = content[:50_000]  # the part is longer than this
    # such a server takes no notice of If-Range
    server.files["x.7z"], server.mode.trusting = content, "unnoticed" in fault or "tag" in fault
    get()
    assert whole(get, content)
    if fault in ("ranges ignored", "changed", "shrunk"):
        assert any("starting from the beginning" in line for line in get.told)


def test_a_change_that_the_tag_hides_is_found_by_the_hash(server, get, content):
    server.mode.cut, server.mode.tag = 120_000, '"always"'
    with pytest.raises(DownloadError):
        get(tries=1)
    server.mode.cut, server.files["x.7z"] = None, content[::-1]
    get(sha256=hashlib.sha256(content[::-1]).hexdigest())
    assert whole(get, content[::-1]) and any("the resumed file has SHA-256" in line for line in get.told)
    get.target.unlink()
    with pytest.raises(DownloadError, match="the fetched file has SHA-256"):
        get(sha256="0" * 64)
    assert list(get.target.parent.iterdir()) == []


def test_a_body_that_ends_early_without_a_word_is_noticed(tmp_path):
    """Older versions of the library below end such a body as if it were whole."""
    part, answer = (
        fetch.Part(tmp_path / "x"),
        types.SimpleNamespace(iter_content=lambda size: iter([b"12", b"3"]), url="x"),
    )
    with pytest.raises(fetch.Passing, match="ended after 3 bytes of 4 bytes"):
        fetch.store(answer, part, 0, 4, progress=False)
    with pytest.raises(DownloadError, match="sent more than the 5 bytes"):
        fetch.store(answer, part, 3, 5, progress=False)
    assert not part.path.exists()


def test_wrong_lengths(server, get, content):
    with pytest.raises(
        DownloadError, match="the server offers 307,200 bytes, expected 307,201; it is another file, or another version"
    ):
        get(size=len(content) + 1)
    assert len(server.log) == 1 and not get.part.exists()
    server.mode.lie = 100  # tells more than it sends, each time anew
    with pytest.raises(DownloadError, match="gave up after 4 attempts"):
        get(tries=4)
    assert not get.target.exists() and len(server.log) == 1 + 4
    server.mode.lie = -100  # sends more than it tells: known where the size is known
    with pytest.raises(DownloadError, match="offers 307,100 bytes, expected 307,200"):
        get(size=len(content))
    assert not get.target.exists()


def test_faults_that_pass_and_faults_that_do_not(server, get, content):
    server.mode.busy = 2
    get()
    assert whole(get, content) and sum("503" in line for line in get.told) == 2
    get.target.unlink()
    server.log.clear()
    server.mode.busy = 99
    with pytest.raises(DownloadError, match="the server answers 503 Service Unavailable; gave up after 3 attempts"):
        get(tries=3)
    assert len(server.log) == 3
    server.mode.busy, server.mode.status = 0, 403
    with pytest.raises(DownloadError, match="answers 403 Forbidden; it refuses access"):
        get()
    server.mode.status = 404
    with pytest.raises(DownloadError, match="answers 404 Not Found; check the name and the base address"):
        get()
    assert len(server.log) == 3 + 2 and list(get.target.parent.iterdir()) == []
    with pytest.raises(DownloadError, match=r"no connection ..*Connection refused.; gave up after 2 attempts"):
        fetch.fetch("http://127.0.0.1:9/x", get.target, tries=2, wait=0, say=get.told.append)
    with pytest.raises(DownloadError, match="not an address that can be fetched"):
        fetch.fetch("nowhere", get.target)


def test_a_small_disk_is_refused_before_and_a_full_one_while_writing(server, get, content, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=300_000))
    with pytest.raises(DownloadError, match="x.7z needs 307 kB, only 300 kB are free"):
        get()
    assert get.part.stat().st_size == 0
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Full:
        def __init__(self, path, *rest):
            self.file = open(path, *rest)

        def __enter__(self):
            return self

        def __exit__(self, *fault):
            self.file.close()

        def write(self, block):
            if self.file.tell() > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(block)

    monkeypatch.setattr(fetch, "open", Full, raising=False)
    with pytest.raises(
        DownloadError, match="x.7z.part: cannot be written .No space left on device.; the received bytes are kept"
    ):
        get()
    monkeypatch.undo()
    get()
    assert whole(get, content) and server.asked()[-1].startswith("bytes=1")


# --- archives that are not trusted ----------------------------------------------------------------------------------

def pack(path: Path, files: dict, rename: dict | None = None) -> Path:
    """Write an archive; `rename` gives entries names that py7zr would not write by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with py7zr.SevenZipFile(path, "w") as packed:
        for name, content in files.items():
            packed.writestr(content, name)
        for entry in packed.header.files_info.files:
            entry["filename"] = (rename or {}).get(entry["filename"], entry["filename"])
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "pipes/../../evil", "/var/evil", "C:/evil", "C:evil", "..\\evil", "\\\\host\\evil", "pipes/a\nb",
        "pipes/./a", "pipes//a", "other/a", "pipesx/a",
    ],
)
def test_names_that_leave_the_folder(tmp_path, name):
    path = pack(tmp_path / "bad.7z", {"pipes/good": b"good", "x": b"evil"}, {"x": name})
    with py7zr.SevenZipFile(path) as written:
        # py7zr writes its own way of slashes, and nothing else may be lost
        (name,) = {name, name.replace("\\", "/")} & set(written.getnames())
    (tmp_path / "data").mkdir()
    for root in ("pipes", None) if name not in ("other/a", "pipesx/a") else ("pipes",):
        with pytest.raises(SceneError, match="bad.7z: refused, nothing was unpacked: ") as told:
            unpack(path, tmp_path / "data", root=root, progress=False)
        assert repr(name) in str(told.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bad.7z", "data"] and not Path("/var/evil").exists()


@pytest.mark.parametrize("target", ["/etc/passwd", "good", "../.."])
def test_links_are_refused_wherever_they_lead(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "good").write_text("good")
    with py7zr.SevenZipFile(tmp_path / "bad.7z", "w") as packed:
        packed.write(tmp_path / "good", "pipes/good")
        packed.write(tmp_path / "link", "pipes/link")
    with pytest.raises(SceneError, match="'pipes/link' is a link or a special file"):
        unpack(tmp_path / "bad.7z", tmp_path / "data", progress=False)
    assert list((tmp_path / "data").iterdir()) == []


def test_bombs_twins_locks_and_damage(tmp_path, monkeypatch):
    data = tmp_path / "data"
    bomb = pack(tmp_path / "bomb.7z", {"pipes/a": bytes(2 * 10**6)})
    assert bomb.stat().st_size < 2000
    with pytest.raises(SceneError, match="would unpack to 2 MB in 1 entries, expected at most"):
        unpack(bomb, data, progress=False)
    assert unpack(bomb, tmp_path / "meant", largest=10**7, progress=False)["pipes/a"].size == 2 * 10**6
    with pytest.raises(SceneError, match="'pipes/A' and 'pipes/a' are one file on many disks"):
        unpack(pack(tmp_path / "twins.7z", {"pipes/A": b"1", "pipes/a": b"2"}), data, progress=False)
    with pytest.raises(SceneError, match="'pipes/a' and 'pipes/a' are one file"):
        unpack(
            pack(tmp_path / "same.7z", {"pipes/a": b"1", "pipes/b": b"2"}, {"pipes/b": "pipes/a"}), data, progress=False
        )
    with py7zr.SevenZipFile(tmp_path / "locked.7z", "w", password="secret") as packed:
        packed.writestr(b"1", "pipes/a")
    with pytest.raises(SceneError, match="locked.7z: needs a password"):
        unpack(tmp_path / "locked.7z", data, progress=False)
    good = pack(tmp_path / "good.7z", {"pipes/a": os.urandom(5000), "pipes/b": os.urandom(5000)}).read_bytes()
    for content in (
        good[:-20], good[:3000], b"<html>not found</html>", b"", good[:2000] + bytes([good[2000] ^ 1]) + good[2001:],
    ):
        (tmp_path / "damaged.7z").write_bytes(content)
        with pytest.raises(
            SceneError, match="damaged.7z: not a complete 7-Zip archive .*; remove it and fetch it again"
        ):
            unpack(tmp_path / "damaged.7z", data, progress=False)
    assert list(data.iterdir()) == []
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=9_999))
    with pytest.raises(DownloadError, match="unpacking good.7z needs 10 kB, only 10 kB are free"):
        unpack(tmp_path / "good.7z", data, progress=False)
    assert list(data.iterdir()) == []


def test_a_damaged_list_of_contents_is_refused_or_harmless(tmp_path):
    """Bytes of the list are changed and its checksums mended, so that only what it says can give it away."""
    want, rng = {"p/a": bytes(range(200)), "p/b/c": b"x" * 500, "p/e": b""}, random.Random(0)
    with py7zr.SevenZipFile(tmp_path / "good.7z", "w") as packed:
        packed.set_encoded_header_mode(False)
        for name, content in want.items():
            packed.writestr(content, name)
    good, refused = (tmp_path / "good.7z").read_bytes(), 0
    start, length = struct.unpack_from("<QQ", good, 12)
    for trial in range(150):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 2, 5))):
            bad[32 + start + rng.randrange(length)] = rng.randrange(256)
        struct.pack_into("<I", bad, 28, zlib.crc32(bytes(bad[32 + start:])))
        struct.pack_into("<I", bad, 8, zlib.crc32(bytes(bad[12:32])))
        (tmp_path / "bad.7z").write_bytes(bad)
        try:
            unpack(tmp_path / "bad.7z", tmp_path / f"data{trial}", progress=False)
            assert {p.read_bytes() for p in tmp_path.glob(f"data{trial}/**/*") if p.is_file()} <= set(want.values())
        except (SceneError, DownloadError):
            refused += 1
            assert not list((tmp_path / f"data{trial}").iterdir())
    assert refused > 100 and {p.name.rstrip("0123456789") for p in tmp_path.iterdir()} == {"good.7z", "bad.7z", "data"}


def test_the_writer_trusts_neither_names_nor_sizes(tmp_path):
    """The second line of defence, should an archive get past the first."""
    factory = writers(tmp_path, {"a": Packed(3, None)}, lambda count: None)
    writer = factory.create(str(tmp_path / "a"))
    writer.write(b"12")
    with pytest.raises(SceneError, match="a: unpacks to more bytes than the archive states"):
        writer.write(b"34")
    writer.close()
    for name in (tmp_path.parent / "b", tmp_path / "b"):
        with pytest.raises(SceneError, match="not in the archive's index"):
            factory.create(str(name))
    with pytest.raises(FileExistsError):
        factory.create(str(tmp_path / "a"))


def test_what_is_there_is_kept_if_it_is_the_same_and_never_overwritten_if_not(tmp_path):
    path, data = pack(tmp_path / "x.7z", {"pipes/a": b"from the archive", "pipes/b/c": b"new"}), tmp_path / "data"
    (data / "pipes").mkdir(parents=True)
    for content, fits in ((b"from the archive", True), (b"from the painter", False), (b"shorter", False)):
        (data / "pipes/a").write_bytes(content)
        if fits:
            unpack(path, data, progress=False)
            continue
        with pytest.raises(
            SceneError,
            match=r"1 files exist already and differ from those in x.7z: pipes/a; move them away, or replace them",
        ):
            unpack(path, data, progress=False)
        assert (data / "pipes/a").read_bytes() == content
    unpack(path, data, replace=True, progress=False)
    assert (data / "pipes/a").read_bytes() == b"from the archive" and sorted(p.name for p in data.iterdir()) == [
        "pipes"
    ]
    with pytest.raises(SceneError, match="pipes/b/c/d; move them"):  # a file stands where a folder must be
        unpack(pack(tmp_path / "y.7z", {"pipes/b/c/d": b""}), data, progress=False)


# --- scenes ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small scene, called as one of ETH3D's, and its archives by file name."""
    base = tmp_path_factory.mktemp("made")
    scene = toy_scene(base, "office", frames=3, size=(168, 252))
    with py7zr.SevenZipFile(base / "office_dslr_undistorted.7z", "w") as packed:
        for part in ("images", "dslr_calibration_undistorted"):
            packed.writeall(scene / part, f"office/{part}")
    photos = [p.name for p in sorted((scene / "images/dslr_images_undistorted").iterdir())]
    pack(base / "office_dslr_jpg.7z", {f"office/images/dslr_images/{name}": b"original" for name in photos}
         | {"office/dslr_calibration_jpg/cameras.txt": b"# none\n"})
    pack(
        base / "office_dslr_depth.7z",
        {f"office/ground_truth_depth/dslr_images/{name}": os.urandom(400) for name in photos},
    )
    return scene, {path.name: path.read_bytes() for path in base.glob("*.7z")}


@pytest.fixture
def scenes(server, made, tmp_path):
    """Fetch the scene's archives; what a person is told is kept in `scenes.told`."""
    server.files.update(made[1])

    def call(kinds="undistorted", **options):
        common = {"base_url": server.url, "wait": 0, "progress": False, "say": call.told.append}
        return fetch_scenes("office", kinds, tmp_path / "data", **{**common, **options})
    call.told, call.folder = [], tmp_path / "data"
    return call


def test_archives_become_a_scene_that_opens(server, scenes, made):
    (folder,) = scenes("depth,undistorted,originals")
    scene, twin = open_scene(folder), open_scene(made[0])
    assert [f.name for f in scene.frames] == [f.name for f in twin.frames] and (
        scene.points.xyz == twin.points.xyz
    ).all()
    assert (
        all(f.depth_path.stat().st_size == 400 for f in scene.frames)
        and scene.metric
        and scene.jpg_cameras.name == "dslr_calibration_jpg"
    )
    assert find_scenes(str(scenes.folder)) == [folder]
    assert sorted(p.name for p in scenes.folder.iterdir() if not p.name.endswith(".lock")) == ["office"]
    text = "\n".join(scenes.told)
    assert (
        text.index("CC BY-NC-SA 4.0")
        < text.index("room needed: about")
        < text.index("free there")
        < text.index("office_dslr_undistorted: 6 files")
    )
    assert f"opens as {scene}" in text
    server.log.clear()
    scenes.told.clear()
    scenes("depth,undistorted,jpg")
    assert not server.log and sum("nothing to do" in line for line in scenes.told) == 3


def test_real_photographs_make_the_journey(server, tmp_path):
    """ETH3D's own text and photos (made small), packed by 7-Zip itself where that program is at hand."""
    real = real_scene("eth3d_pipes")
    if real is None:
        pytest.skip("shared/data/eth3d_pipes is not here")
    shutil.copytree(real, tmp_path / "pipes")
    program = next(filter(None, map(shutil.which, ("7zz", "7z", "7za"))), None)
    if program:
        subprocess.run([program, "a", "-bso0", "pipes.7z", "pipes"], cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
    else:
        with py7zr.SevenZipFile(tmp_path / "pipes.7z", "w") as packed:
            packed.writeall(tmp_path / "pipes", "pipes")
    server.files["pipes_dslr_undistorted.7z"] = (tmp_path / "pipes.7z").read_bytes()
    server.mode.cut = 2_000_000
    (folder,) = fetch_scenes(
        "pipes", to=tmp_path / "data", base_url=server.url, wait=0, progress=False, say=lambda line: None
    )
    scene = open_scene(folder)
    assert len(scene) == 14 and scene.metric and len(server.asked()) == 2
    assert all((folder / p.relative_to(real)).read_bytes() == p.read_bytes() for p in real.rglob("*") if p.is_file())


def test_kinds_come_one_by_one_and_missing_files_come_back(server, scenes):
    (folder,) = scenes("depth")
    assert any("fetch the kind jpg as well" in line for line in scenes.told) and not (folder / "images").exists()
    scenes("undistorted,jpg", keep=True)
    assert sorted(p.name for p in scenes.folder.glob("*.7z")) == ["office_dslr_jpg.7z", "office_dslr_undistorted.7z"]
    (folder / "images/dslr_images_undistorted" / open_scene(folder).frames[1].image_path.name).unlink()
    with pytest.raises(SceneError, match="1 of 3 photos are missing"):
        open_scene(folder)
    server.log.clear()
    scenes("undistorted,jpg,depth")
    assert len(open_scene(folder)) == 3 and not server.log, "the archive was kept, nothing had to be fetched"


def test_a_small_disk_is_refused_before_anything_is_fetched(server, scenes, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
    with pytest.raises(DownloadError, match=r"data: the download needs 2.54 GB, only 1 MB are free on that disk"):
        scenes("depth")  # 26 maps of 6048 x 4032 floats
    assert not server.asked() and not scenes.folder.exists()


def test_sizes_of_published_manifests_are_compared(server, scenes, tmp_path, made):
    server.files["facade_dslr_depth.7z"] = b"short"
    call = {
        "kinds": "depth", "to": tmp_path / "data", "base_url": server.url, "progress": False, "say": scenes.told.append,
    }
    with pytest.raises(
        DownloadError, match="facade_dslr_depth.7z: has 5 bytes, published manifests say 804,421,080.*--any-size"
    ):
        fetch_scenes("facade", **call)
    with pytest.raises(SceneError, match="facade_dslr_depth.7z: not a complete 7-Zip archive"):
        fetch_scenes("facade", any_size=True, **call)
    server.files["pipes_dslr_depth.7z"] = made[1]["office_dslr_depth.7z"]
    with pytest.raises(SceneError, match="lies outside the folder pipes/"):
        fetch_scenes("pipes", **call)
    assert not (tmp_path / "data/pipes").exists() and not (tmp_path / "data/office").exists()


def test_one_archive_that_is_not_there_stops_all_before_the_first(server, scenes):
    with pytest.raises(DownloadError, match="office_dslr_occlusion.7z: the server answers 404"):
        scenes("undistorted,occlusion")
    assert not server.asked() and not scenes.folder.exists()
    with pytest.raises(ConfigError, match="unknown kind of archive 'deep'.*Did you mean 'depth'"):
        scenes("deep")


@pytest.mark.parametrize("moment", [0, 1])
def test_an_interruption_while_moving_leaves_no_half_scene(scenes, monkeypatch, moment):
    """Before the first folder is moved into a scene that exists, and between the photos and their cameras."""
    (folder,) = scenes("depth")
    whole, moves = os.replace, []

    def stopped(source, target):
        if ".unpacking." in str(source):
            if len(moves) == moment:
                raise KeyboardInterrupt
            moves.append(target)
        return whole(source, target)
    monkeypatch.setattr(archive.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        scenes()
    assert (folder / "images").exists() == bool(moment) and not list(scenes.folder.glob(".unpacking.*"))
    with pytest.raises(SceneError, match="no COLMAP model found"):
        open_scene(folder)
    monkeypatch.setattr(archive.os, "replace", whole)
    scenes()
    assert len(open_scene(folder)) == 3


# --- the command ----------------------------------------------------------------------------------------------------

def command(*words, **environment):
    # a shell that runs the tests in the background makes its children deaf to Ctrl-C; at a terminal they are not
    return subprocess.Popen(
        [sys.executable, "-m", "vggt_lora.download", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, stdin=subprocess.DEVNULL, env={**os.environ, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_in_the_middle_it_goes_on(server, made, tmp_path, how, status):
    server.files.update(made[1])
    size = len(made[1]["office_dslr_undistorted.7z"])
    server.mode.cut, server.mode.hang = size // 2, threading.Event()
    words, part = (
        ("office", "--to", tmp_path / "data", "--base-url", server.url),
        tmp_path / "data/office_dslr_undistorted.7z.part",
    )
    process = command(*words)
    until = time.monotonic() + 600
    while not (part.exists() and part.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(how)
    _, err = process.communicate(timeout=600)
    server.mode.hang.set()
    kept = part.stat().st_size
    assert process.returncode == status and 0 < kept < size and not (tmp_path / "data/office").exists()
    assert (
        how == signal.SIGKILL or "interrupted; the received bytes are kept, the same command goes on from there" in err
    )
    server.mode.cut, server.mode.hang = None, None
    process = command(*words)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert (
        server.asked() == [None, f"bytes={kept}-"]
        and "opens as Scene(office: 3 photos" in out
        and "resuming after" in out
    )
    assert len(open_scene(tmp_path / "data/office")) == 3 and not part.exists()


def test_exit_statuses_and_messages(server, made, tmp_path, capsys):
    server.files.update(made[1])
    to = ["--to", str(tmp_path / "data"), "--base-url", server.url, "--quiet"]
    assert main(["office", "--plan", *to]) == 0 and not (tmp_path / "data").exists()
    assert "room needed: about" in capsys.readouterr().out
    assert main(["office", *to]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("ETH3D is licensed CC BY-NC-SA 4.0")
    assert re.search(r"opens as Scene.office: 3 photos, \d+ points, metres", told.out) and told.err == ""
    assert main(["office", "--kinds", "occlusion", *to]) == 1
    assert capsys.readouterr().err.startswith(
        f"vggt_lora_download: {server.url}/office_dslr_occlusion.7z: the server answers 404"
    )
    for words, hint in (
        (["ofice"], "Did you mean 'office'?"),
        ([], "name a scene or a repository"),
        (["office", "--kind", "jgp"], "Did you mean 'jpg'?"),
        (["office", "--tries", "x"], "invalid int value"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, *to])
        assert stop.value.code == 2 and hint in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["office", "--to", str(tmp_path / "file"), "--base-url", server.url]) == 1
    assert capsys.readouterr().err.startswith(f"vggt_lora_download: {tmp_path / 'file'}: cannot be written (")
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert (
        all(kind.archive in out for kind in KINDS.values())
        and "facade" in out
        and "facebook/VGGT-1B" in out
        and "non-commercial" in out
    )


def test_two_at_a_time_are_refused(scenes):
    from filelock import FileLock
    scenes.folder.mkdir()
    with (
        FileLock(scenes.folder / ".vggt_lora_download.lock"),
        pytest.raises(DownloadError, match="another download into this folder is running"),
    ):
        scenes()
    scenes()


def test_the_console_script_is_installed():
    """In a process of its own: here another test may have imported Python's distutils in place of setuptools' copy."""
    import importlib

    code = ("import setuptools; from distutils.core import run_setup; "
            "print(run_setup('setup.py', stop_after='init').entry_points['console_scripts'][0])")
    entry = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    name, _, target = entry.split()[-1].partition("=")
    module, _, function = target.partition(":")
    assert (name, getattr(importlib.import_module(module), function)) == ("vggt_lora_download", main)


# --- weights --------------------------------------------------------------------------------------------------------

def hub(server, home, *words):
    process = command(*words, "--quiet", HF_ENDPOINT=server.url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1")
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def test_weights_are_continued_and_found_by_the_hub_client(server, content, tmp_path):
    name = "someone/net/resolve/main/model.safetensors"
    server.files.update({name: content, "someone/net/resolve/main/config.json": b"{}"})
    server.mode.cut = 120_000
    code, out, err = hub(server, tmp_path, "someone/net", "--tries", "1")
    assert (
        code == 1
        and "someone/net: see the licence on the page of this repository" in out
        and "model.safetensors, 307 kB" in out
    )
    assert "gave up after 1 attempt; the received bytes are kept" in err and not list(
        tmp_path.rglob("model.safetensors")
    )
    (part,) = tmp_path.rglob("*.part")
    kept = part.stat().st_size
    assert kept > 100_000
    server.mode.cut = None
    server.log.clear()
    code, out, err = hub(server, tmp_path, "someone/net")
    assert code == 0, err
    assert "complete; VGGT.from_pretrained('someone/net') finds it" in out
    assert [asked for method, path, asked in server.log if method == "GET" and path == name] == [f"bytes={kept}-"], (
        "the client fetched it again"
    )
    (found,) = tmp_path.rglob("model.safetensors")
    assert found.read_bytes() == content and found.parent.name == "0" * 40 and not list(tmp_path.rglob("*.part*"))
    server.files[name] = content[::-1]  # of another hash than its name on the hub would say
    server.mode.tag = f'"{hashlib.sha256(content[:-1]).hexdigest()}"'
    code, out, err = hub(server, tmp_path / "other", "someone/net")
    assert (
        code == 1
        and "the fetched file has SHA-256" in err
        and not list((tmp_path / "other").rglob("model.safetensors"))
    )


def test_weights_that_the_hub_has_not(server, tmp_path):
    code, out, err = hub(server, tmp_path, "facebook/VGGT-1B")
    assert code == 1 and "facebook/VGGT-1B: the weights are for non-commercial use" in out
    assert "vggt_lora_download: hub repository 'facebook/VGGT-1B' gave neither model.safetensors nor model.pt" in err
