"""The way back: checkpoints for the official code, a push to a small hub on this machine, and adapters of every kind
stacked and scaled.
"""
import base64
import copy
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from vggt_lora.adapters import export, hub, stack
from vggt_lora.adapters.adapter import _exactly, fingerprint, load_adapter, merge, save_adapter
from vggt_lora.core import ConfigError, VggtLoraError, WeightsError
from vggt_lora.files.atomic import write_json
from vggt_lora.model import track_head
from vggt_lora.model.embedded import write_shipped
from vggt_lora.model.vggt import VGGT, VGGTConfig

TARGETS = [
    "aggregator.frame_blocks.2.attn.qkv", "aggregator.global_blocks.3.mlp.fc1", "depth_head.projects.1",
    "depth_head.resize_layers.3", "depth_head.scratch.refinenet1.resConfUnit2.conv1", "camera_head.poseLN_modulation.1",
]
KINDS = {
    "lora": {},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True, "modules_to_save": ["depth_head.norm"]},
    "full": {"modules_to_save": ["depth_head.resize_layers.0", "depth_head.norm", "camera_head.trunk_norm"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small network that has all four heads, the tracker cut short."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        for name, value in {"TRACK_BLOCKS": 1, "TRACK_WIDTH": 32, "VIRTUAL_TRACKS": 4, "CORRELATIONS": 27}.items():
            patch.setattr(track_head, name, value)
        torch.manual_seed(0)
        config = VGGTConfig.from_dict(
            VGGTConfig.golden().to_dict()
            | {"track_head": True, "track_features": 16, "vit_depth": 1, "camera_trunk_depth": 1}
        )
        yield VGGT(config).save_pretrained(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def images():
    return torch.rand(1, 2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run with a plain adapter, read by many and changed by none."""
    return made(base, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def plain(base):
    """The base with the heads that a run loads."""
    return VGGT.from_pretrained(base, point_head=False)


def outputs(model, images) -> dict:
    with torch.no_grad():
        return {n: v for n, v in model(images).items() if isinstance(v, torch.Tensor)}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def made(base: Path, folder: Path, kind: str = "lora", targets=TARGETS, seed: int = 0) -> Path:
    """A run folder with an adapter of PEFT's own making, every trained number moved."""
    model = VGGT.from_pretrained(base, point_head=False)
    mark = fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=_exactly(targets), **KINDS[kind]))
    adapted.base_fingerprint, generator = mark, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(adapted, folder / "adapter", {"config": {"strategy": "custom", "model": str(base)}})
    return folder


# --- merged ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["use_rslora", "use_dora", "full"])
def test_a_merged_checkpoint_is_the_base_file_but_for_what_was_trained(base, plain, images, tmp_path, kind):
    run = made(base, tmp_path / "run", kind)
    wanted = outputs(load_adapter(copy.deepcopy(plain), run / "adapter"), images)
    report = export.export_merged(run, tmp_path / "merged")
    old = load_file(base / "model.safetensors")
    for name in ("model.safetensors", "model.pt"):
        path = report.folder / name
        new = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in old.items()}
        assert list(export.StoredTensors(path)) == list(export.StoredTensors(base / "model.safetensors"))
        changed = {n for n in new if not torch.equal(new[n], old[n])}
        full = KINDS[kind].get("modules_to_save", [])
        assert changed == {f"{n}.weight" for n in TARGETS} | {f"{m}.{p}" for m in full for p in ("weight", "bias")}
        assert len(changed) == report.merged and len(new) == report.merged + report.untouched
        model = VGGT.from_pretrained(path, track_head=True)
        assert model.load_report.n_loaded == len(old) and not model.load_report.dropped and not model.load_report.absent
        for key, value in outputs(model, images).items():
            if key in wanted:
                torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-5)
        assert not equal(outputs(model, images), outputs(VGGT.from_pretrained(base), images))
    assert report.carried == {"point_head": 62, "track_head": sum(n.startswith("track_head.") for n in old)}
    assert report.difference < 1e-5 and sorted(p.name for p in report.folder.iterdir()) == [
        "config.json",
        "model.pt",
        "model.safetensors",
    ]


def test_the_base_may_be_a_torch_file_in_an_order_of_its_own(base, run, tmp_path):
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors, reverse=True)
    torch.save({"model": {n: tensors[n] for n in names}, "prev_epoch": 3}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    export.export_merged(run, tmp_path / "merged", base=tmp_path / "model.pt")
    assert list(torch.load(tmp_path / "merged" / "model.pt", weights_only=True)) == names


def test_a_base_in_half_precision_is_widened_exactly(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        path = write_shipped(VGGT(VGGTConfig.golden()), tmp_path / "base", {})
    run = made(path, tmp_path / "run")
    report = export.export_merged(run, tmp_path / "merged")
    new, old = load_file(report.folder / "model.safetensors"), load_file(path)
    assert {t.dtype for t in old.values()} == {torch.float16} and {t.dtype for t in new.values()} == {torch.float32}
    assert sum(not torch.equal(new[n], old[n].float()) for n in old) == len(TARGETS) == report.merged
    assert VGGT.from_pretrained(report.folder).load_report.n_loaded == len(old)


def damaging(monkeypatch, change):
    """Let save_file write something else than it was given."""
    import safetensors.torch

    honest = safetensors.torch.save_file
    monkeypatch.setattr(
        "safetensors.torch.save_file",
        lambda tensors, path, metadata=None: honest(change(dict(tensors)), path, metadata=metadata),
    )


@pytest.mark.parametrize(
    "change, word",
    [
        (
            lambda t: t | {"track_head.tracker.fmap_norm.bias": t["track_head.tracker.fmap_norm.bias"] + 1e-6},
            "differs from .* although the adapter does not change it",
        ),
        (lambda t: {n: v for n, v in t.items() if n != "point_head.norm.bias"}, "other names"),
        (lambda t: t | {"depth_head.norm.bias": t["depth_head.norm.bias"].half()}, "is torch.float16"),
        (lambda t: t | {"depth_head.norm.bias": t["depth_head.norm.bias"][:3].clone()}, "in .* it is"),
        (lambda t: t | {f"{TARGETS[2]}.weight": t[f"{TARGETS[2]}.weight"] * 1.01}, "not written as it was merged"),
        (lambda t: t | {f"{TARGETS[2]}.weight": t[f"{TARGETS[2]}.weight"] * float("nan")}, "NaN"),
    ],
    ids=["changed", "lost", "dtype", "shape", "not as merged", "nan"],
)
def test_what_was_written_wrongly_never_gets_its_name(base, run, tmp_path, monkeypatch, change, word):
    damaging(monkeypatch, change)
    with pytest.raises(WeightsError, match=word):
        export.export_merged(run, tmp_path / "merged")
    # which lets the same call be repeated
    assert [path.name for path in (tmp_path / "merged").iterdir()] == [export.UNFINISHED]


def test_a_merge_that_changes_the_outputs_is_not_written(base, run, tmp_path, monkeypatch):

    def careless(adapted):
        model = merge(adapted)
        with torch.no_grad():
            model.depth_head.scratch.output_conv1.weight *= 1.1
        return model
    monkeypatch.setattr(export, "merge", careless)
    with pytest.raises(VggtLoraError, match="merged and unmerged outputs differ .* nothing was written"):
        export.export_merged(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(base, run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000))
    with pytest.raises(WeightsError, match="only 0.00 GB are free"):
        export.export_merged(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_earlier_export_is_replaced_only_when_asked(base, run, tmp_path):
    export.export_merged(run, tmp_path / "merged")
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    run = made(base, tmp_path / "run", seed=1)
    with pytest.raises(ConfigError, match="exists already"):
        export.export_merged(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before
    export.export_merged(run, tmp_path / "merged", replace=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() != before
    for target in (base, base / "." / "", Path(os.path.relpath(base))):
        with pytest.raises(ConfigError, match="holds the base itself"):
            export.export_merged(run, target, replace=True)


# --- the adapter alone ----------------------------------------------------------------------------------------------

class Official(torch.nn.Module):
    """The official class as far as PEFT sees it: the same children, no configuration, no loader of ours."""

    def __init__(self, inner):
        super().__init__()
        object.__setattr__(self, "inner", inner)
        for name, child in inner.named_children():
            self.add_module(name, child)

    def forward(self, images):
        return self.inner(images)


@pytest.mark.parametrize("kind", ["use_dora", "full"])
def test_an_exported_adapter_loads_by_plain_peft(base, plain, images, tmp_path, kind):
    run = made(base, tmp_path / "run", kind)
    wanted = outputs(load_adapter(copy.deepcopy(plain), run / "adapter"), images)
    folder = export.export_adapter(run, tmp_path / "exported")
    got = outputs(
        PeftModel.from_pretrained(Official(VGGT.from_pretrained(base, track_head=True)), folder).eval(), images
    )
    assert all(torch.equal(got[key], value) for key, value in wanted.items())
    content = json.loads((folder / "adapter_config.json").read_text())
    assert content["target_modules"] == sorted(TARGETS) and content["modules_to_save"] == (
        sorted(KINDS[kind].get("modules_to_save", [])) or None
    )
    assert all((p.stat().st_mode & 0o044) == 0o044 for p in folder.iterdir())


def test_the_official_class_is_found_by_name(base, run, plain, images, tmp_path, monkeypatch):
    """peft.AutoPeftModel imports the class that the folder names; here a module of that name stands in."""
    monkeypatch.setattr(
        VGGTConfig, "vggt_1b", classmethod(lambda cls: VGGT.from_pretrained(base, track_head=True).config)
    )
    folder = export.export_adapter(run, tmp_path / "exported", base="facebook/VGGT-1B")
    asked = []

    class Named(Official):
        @classmethod
        def from_pretrained(cls, name, **options):
            asked.append(name)
            return cls(VGGT.from_pretrained(base))
    for name in ("vggt", "vggt.models", "vggt.models.vggt"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vggt.models.vggt"].VGGT = Named
    allowed = {"import_allowlist": ["vggt.models.vggt"]} if hasattr(peft.auto, "check_import_allowlist") else {}
    model = AutoPeftModel.from_pretrained(str(folder), **allowed)
    wanted = outputs(load_adapter(copy.deepcopy(plain), run / "adapter"), images)
    assert asked == ["facebook/VGGT-1B"] and torch.equal(outputs(model, images)["depth"], wanted["depth"])


def test_an_export_never_replaces_something_else(base, tmp_path):
    run = made(base, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"x")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "photo.jpg", run):
        with pytest.raises(ConfigError, match="exists and is not an adapter folder"):
            export.export_adapter(run, folder)
    assert (tmp_path / "mine" / "photo.jpg").read_bytes() == b"x" and (run / "adapter").is_dir()
    first = export.export_adapter(run, tmp_path / "out")
    assert export.export_adapter(run, tmp_path / "out") == first and [
        p.name for p in tmp_path.iterdir() if p.name.startswith(".")
    ] == [".out.lock"]


# --- stacked and scaled ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["use_rslora", "use_dora", "full"])
def test_scales_begin_at_the_base_and_end_as_loaded(base, plain, images, tmp_path, kind):
    run = made(base, tmp_path / "run", kind)
    bare, model = outputs(plain, images), load_adapter(copy.deepcopy(plain), run / "adapter")
    wanted = outputs(model, images)
    seen = []
    for scale in (0, 0.5, 1, 0.5):
        stack.scale_adapter(model, scale)
        now = outputs(model, images)
        seen.append(now)
        assert equal(now, bare) == (scale == 0) and equal(now, wanted) == (scale == 1)
        with stack.without_adapter(model):
            assert equal(outputs(model, images), bare)
        assert equal(outputs(model, images), now)
    assert equal(seen[1], seen[3])
    stack.scale_adapter(model, 0.5)
    for key, value in outputs(merge(model), images).items():
        torch.testing.assert_close(value, seen[1][key], rtol=1e-4, atol=1e-5)


def test_small_steps_of_the_scale_move_the_outputs_little(base, plain, images, tmp_path):
    """Nothing jumps on the way from the base to the adapter, DoRA's magnitudes and full layers included."""
    model = load_adapter(copy.deepcopy(plain), made(base, tmp_path / "run", "use_dora") / "adapter")
    whole = (outputs(model, images)["depth"] - outputs(plain, images)["depth"]).abs().mean()
    stack.scale_adapter(model, 1e-4)
    assert (outputs(model, images)["depth"] - outputs(plain, images)["depth"]).abs().mean() < 0.01 * whole


def test_disjoint_adapters_of_different_kinds_act_each_on_its_own(base, plain, images, tmp_path):
    depth = made(base, tmp_path / "depth", "use_dora", [t for t in TARGETS if t.startswith("depth_head")]) / "adapter"
    camera = made(base, tmp_path / "camera", "lora", ["camera_head.poseLN_modulation.1"], seed=3) / "adapter"
    alone = [outputs(load_adapter(copy.deepcopy(plain), folder), images) for folder in (depth, camera)]
    both = stack.stack_adapters(copy.deepcopy(plain), {"depth": depth, "camera": camera})
    got = outputs(both, images)
    assert torch.equal(got["depth"], alone[0]["depth"]) and torch.equal(got["pose_enc"], alone[1]["pose_enc"])
    for key, value in outputs(merge(both), images).items():
        torch.testing.assert_close(value, got[key], rtol=1e-4, atol=1e-5)
    off = stack.stack_adapters(copy.deepcopy(plain), {"depth": depth, "camera": camera}, scales={"depth": 0})
    assert equal(outputs(off, images), alone[1])


@pytest.mark.parametrize(
    "kinds, word",
    [
        (("use_dora", "lora"), "cannot be added"),
        (("lora", "use_dora"), "cannot be added"),
        (("full", "full"), "exclude each other"),
    ],
)
def test_adapters_that_cannot_be_added_are_refused(base, tmp_path, kinds, word):
    folders = [made(base, tmp_path / f"run{i}", kind) / "adapter" for i, kind in enumerate(kinds)]
    model = VGGT.from_pretrained(base, point_head=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match=word):
        stack.stack_adapters(model, folders)
    assert model.state_dict().keys() == before.keys() and not hasattr(model, "peft_config")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.depth_head.norm.bias[0] += 1
    with pytest.raises(WeightsError, match="another base"):
        stack.stack_adapters(other, folders[:1])


# --- the hub --------------------------------------------------------------------------------------------------------

TOKEN = "hf_ThisIsNoRealTokenButLooksLikeOne0"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few addresses that a push needs; what is sent is kept in `server.files`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server, path = self.server, self.path.split("?")[0]
        server.log.append((path, self.headers.get("Authorization")))
        for (word, end), code in server.fail.items():
            if word in path + body.decode(errors="replace") and path.endswith(end):
                return self.answer(code, {"error": f"refused, and {self.headers.get('Authorization')} was sent"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        url = f"http://127.0.0.1:{server.server_port}"
        if path == "/api/repos/create":
            said = json.loads(body)
            server.created.append(said)
            repo = f"{said.get('organization') or 'somebody'}/{said['name']}"
            return self.answer(200, {"url": f"{url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            server.cards.append(json.loads(body)["content"])
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            return self.answer(
                200,
                {
                    "files": [
                        {
                            "path": f["path"], "shouldIgnore": False, "oid": None,
                            "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                        }
                        for f in json.loads(body)["files"]
                    ]
                },
            )
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(
                200,
                {
                    "transfer": "basic",
                    "objects": [
                        {**o, "actions": {"upload": {"href": f"{url}/lfs/{o['oid']}"}}}
                        for o in json.loads(body)["objects"]
                    ],
                },
            )
        if "/commit/" in path:
            server.commits.append([json.loads(line) for line in body.splitlines()])
            return self.answer(
                200,
                {
                    "commitUrl": f"{url}/{path.removeprefix('/api/models/').partition('/commit/')[0]}/commit/1",
                    "commitOid": "1" * 40,
                    "success": True,
                },
            )
        return self.answer(404, {"error": path})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.log.append((self.path, None))
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})

    def answer(self, code, content):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.log, server.created, server.cards, server.commits, server.blobs, server.fail = [], [], [], [], {}, {}
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PUSH = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from vggt_lora.core import VggtLoraError
from vggt_lora.lora import push_to_hub
for arguments in eval(sys.argv[1]):
    try:
        print("pushed", push_to_hub(**arguments))
    except VggtLoraError as fault:
        print("refused:", fault)
"""


def push(server, tmp_path, *arguments, token=TOKEN) -> str:
    """Push in a process of its own, since the hub's address is read at import; returns all that it said, DEBUG lines
    included.
    """
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_VERBOSITY": "debug", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    } | ({"HF_TOKEN": token} if token else {})
    done = subprocess.run(
        [sys.executable, "-c", PUSH, repr(list(arguments))], env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def pushed(server) -> dict[str, bytes]:
    """The files of the last commit."""
    files = {}
    for entry in server.commits[-1]:
        if entry["key"] == "file":
            files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        elif entry["key"] == "lfsFile":
            files[entry["value"]["path"]] = server.blobs[entry["value"]["oid"]]
    return files


def test_a_push_arrives_whole_and_loads_or_fails_with_a_reason(server, base, plain, images, tmp_path):
    run = made(base, tmp_path / "run")
    evil = "](http://evil) | <b>\n# h"
    settings = {"strategy": "custom", "model": str(base), "data": str(tmp_path / "houses"), "output": str(run)}
    write_json(
        run / "config.json",
        {
            "config": settings,
            "scenes": [{"name": evil, "frames": 12, "metric": True}],
            "split": {"scenes": {evil: {"train": 10, "val": 2}}},
        },
    )
    write_json(
        run / "results.json",
        {
            "protocol": {"truth": "laser"},
            "table": [{"model": "adapted", "alignment": "none", "frames": 2, "absrel": 0.12345}],
        },
    )
    call = {"run": str(run), "repo": "houses", "base": "facebook/VGGT-1B"}
    cases = {"two": ("/commit/main", 412, "push again"), "three": ("/objects/batch", 403, "may not write there")}
    server.fail = {(name, end): code for name, (end, code, _) in cases.items()}
    said = push(
        server, tmp_path, call, {"run": str(run), "repo": "somebody/merged", "merged": True, "private": False},
        *[call | {"repo": f"somebody/{name}"} for name in cases], call | {"token": "hf_AnotherOneThatIsWrong"},
    ).splitlines()
    assert [line.split()[0] for line in said] == ["pushed", "pushed", *["refused:"] * 3], said
    for line, (name, (_, _, word)) in zip(said[2:], cases.items()):
        assert line.startswith(f"refused: somebody/{name}: not pushed") and word in line
    assert "hf auth login" in said[4] and "AnotherOne" not in said[4]
    assert [(c["name"], c.get("visibility", c.get("private"))) for c in server.created[:2]] == [
        ("houses", "private"),
        ("merged", "public"),
    ]
    server.log = server.log[:-1]  # the last one had the wrong token
    assert len(server.commits) == 2 and all(
        TOKEN in (auth or "") for path, auth in server.log if path.startswith("/api")
    )

    merged = pushed(server)
    assert set(merged) == {".gitattributes", "README.md", "config.json", "model.safetensors"} - {".gitattributes"}
    (tmp_path / "got").mkdir()
    for name, content in merged.items():
        (tmp_path / "got" / name).write_bytes(content)
    assert VGGT.from_pretrained(tmp_path / "got", track_head=True).load_report.absent == ()

    server.commits.pop()
    adapter = pushed(server)
    assert set(adapter) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "vggt_lora.json"}
    (tmp_path / "adapter").mkdir()
    for name, content in adapter.items():
        (tmp_path / "adapter" / name).write_bytes(content)
        assert TOKEN.encode() not in content and str(tmp_path).encode() not in content
    wanted = outputs(load_adapter(copy.deepcopy(plain), run / "adapter"), images)
    assert equal(outputs(load_adapter(copy.deepcopy(plain), tmp_path / "adapter"), images), wanted)
    card = adapter["README.md"].decode()
    assert (
        "# houses" in card
        and "'somebody/houses'" in card
        and 'base_model: facebook/VGGT-1B' in card
        and "license: other" in card
    )
    assert "0.1235" in card or "0.1234" in card
    from huggingface_hub import ModelCard

    results = ModelCard(card).data.eval_results
    assert (
        results
        and {r.metric_type for r in results} <= {"absrel", "d1"}
        and all(r.task_type == "depth-estimation" and "held-out" in r.dataset_name for r in results)
    )
    from markdown_it import MarkdownIt
    page = MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])
    assert (
        page.count("<h") == 4 + page.count("<hr") and "href" not in page and "<b>" not in page and "&lt;b&gt;" in page
    )


def test_a_card_without_records_invents_nothing(base, tmp_path):
    run = made(base, tmp_path / "run")
    (run / "adapter" / "vggt_lora.json").unlink()
    card = hub.model_card(run / "adapter")
    assert (
        "not recorded" in card
        and "No evaluation is recorded" in card
        and "license: other" in card
        and str(tmp_path) not in card
    )
