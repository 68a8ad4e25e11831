"""Loading by hub name, against a small hub on this machine, and the network inside PEFT."""
import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from vggt_lora.core import ConfigError, WeightsError
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.model.weights import config_from_shapes

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serve files of repositories the way the hub's download address does."""

    def __init__(self, root, *args):
        self.root = root
        super().__init__(*args)

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        owner, repository, _, _, *rest = self.path.split("?")[0].strip("/").split("/")
        folder = self.root / owner / repository
        path = folder.joinpath(*rest)
        found = path.is_file()
        self.send_response(200 if found else 404)
        if found:
            size = path.stat().st_size
            for name, value in (("ETag", f'"{size:040x}"'), ("X-Repo-Commit", COMMIT), ("Content-Length", f"{size}")):
                self.send_header(name, value)
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if folder.is_dir() else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
        self.end_headers()
        if found and send:
            self.wfile.write(path.read_bytes())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VGGT(VGGTConfig.golden()).eval()


@pytest.fixture(scope="module")
def hub(tmp_path_factory, model):
    root = tmp_path_factory.mktemp("hub")
    for name in ("someone/new", "someone/old", "someone/empty"):
        (root / name).mkdir(parents=True)
        # the published repositories carry a config of another program: it must not be taken for ours
        (root / name / "config.json").write_text(json.dumps({"img_size": 518, "patch_size": 14, "embed_dim": 1024}))
    save_file(model.state_dict(), root / "someone/new/model.safetensors")
    torch.save({"model": model.state_dict(), "prev_epoch": 3}, root / "someone/old/model.pt")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


LOAD = """
import sys, torch
from vggt_lora.core import WeightsError
from vggt_lora.model.vggt import VGGT
for name in sys.argv[1:]:
    try:
        model = VGGT.from_pretrained(name)
        print(name, model.load_report.n_loaded, sum(p.double().sum() for p in model.parameters()).item())
    except WeightsError as fault:
        print("refused:", fault)
"""


def load(names, hub, home, **extra):
    """Load by hub name in a process of its own: the hub's address is read at import."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                   "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **extra}
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *names], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if line]


def test_hub_names(hub, model, tmp_path):
    names = ["someone/new", "someone/old", "someone/empty", "someone/absent"]
    total = str(sum(p.double().sum() for p in model.parameters()).item())
    new, old, empty, absent = load(names, hub, tmp_path)
    assert new.split() == ["someone/new", "347", total] and old.split() == ["someone/old", "347", total]
    assert empty.startswith("refused: hub repository 'someone/empty' gave neither model.safetensors nor model.pt")
    assert absent.startswith("refused: cannot fetch 'someone/absent' from the hub: RepositoryNotFoundError")
    # what was fetched once is there without a network, and what was not is refused
    new, absent = load([names[0], names[3]], "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert new.split() == ["someone/new", "347", total] and absent.startswith(
        "refused: hub repository 'someone/absent'"
    )


@pytest.mark.parametrize("track_head", [True, False])
def test_published_sizes_are_recognised(track_head):
    config = VGGTConfig.vggt_1b(track_head=track_head)
    with torch.device("meta"):
        state = VGGT(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert config_from_shapes(shapes, "file") == config
    shapes["aggregator.camera_token"] = (1, 2, 1, 512)
    with pytest.raises(WeightsError, match="a VGGT of unknown size"):
        config_from_shapes(shapes, "file")
    with pytest.raises(WeightsError, match="not VGGT weights.*camera_token is missing"):
        config_from_shapes({"weight": (3, 3)}, "file")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"aggregator.frame_blocks.x.y": (3,)}, "file: not VGGT weights: found aggregator.frame_blocks.x, expected"),
        (
            {"aggregator.camera_token": ()},
            r"file: not VGGT weights: aggregator.camera_token has shape \(\), expected 4 axes",
        ),
        ({"aggregator.register_token": (5,)}, r"aggregator.register_token has shape \(5,\), expected 4 axes"),
        ({"aggregator.patch_embed.pos_embed": (5,)}, "pos_embed has shape"),
        ({"aggregator.frame_blocks.0.attn.q_norm.weight": (0,)}, r"q_norm.weight has shape \(0,\)"),
        ({"depth_head.projects.0.weight": ()}, "depth_head.projects.0.weight has shape"),
    ],
)
def test_shapes_that_are_no_vggt_are_named(model, change, words):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=words):
        config_from_shapes({**shapes, **change}, "file")


@pytest.mark.parametrize("head", ["camera_head", "depth_head", "point_head"])
def test_a_file_that_lost_a_head_says_so(model, tmp_path, head):
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{head}.")}, path)
    report = VGGT.from_pretrained(path).load_report
    assert report.absent == tuple(sorted((head, "track_head"))) and f"not in the file: {head}, track_head" in str(
        report
    )
    with pytest.raises(WeightsError, match=f"model.safetensors: holds no {head}"):
        VGGT.from_pretrained(path, **{head: True})
    save_file(model.state_dict(), path)
    full = VGGT.from_pretrained(path, **{head: False}).load_report
    assert full.absent == ("track_head",) and list(full.dropped) == [head]  # left out on purpose is not absent


def test_images_of_another_dtype_are_refused_with_the_remedy(model):
    for run in (model, model.encode):
        with pytest.raises(
            ConfigError, match=r"images are float64, the weights float32: give images.to\(torch.float32\)"
        ):
            run(torch.rand(1, 3, 28, 28, dtype=torch.float64))
        with pytest.raises(ConfigError, match="images are bfloat16, the weights float32"):
            run(torch.rand(1, 3, 28, 28).bfloat16())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.rand(1, 3, 28, 28).bfloat16()).depth.dtype == torch.float32  # autocast settles it


def test_faults_name_file_and_tensor(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "net")
    path = folder / "model.safetensors"
    whole = load_file(path)
    for change, words in [
        ({"depth_head.norm.bias": None}, r"model.safetensors: 1 tensors are missing: depth_head.norm.bias"),
        ({"lora.A": torch.ones(2)}, "1 tensors are not part of this network: lora.A"),
        ({"depth_head.norm.bias": torch.ones(3)}, r"depth_head.norm.bias \(3,\) instead of \(128,\)"),
        ({"depth_head.norm.bias": torch.ones(128).half()}, "torch.float16 instead of torch.float32"),
        ({"depth_head.norm.bias": torch.full((128,), float("inf"))}, "not finite: depth_head.norm.bias"),
    ]:
        save_file({k: v for k, v in {**whole, **change}.items() if v is not None}, path)
        with pytest.raises(WeightsError, match=words):
            VGGT.from_pretrained(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="damaged or was cut short"):
        VGGT.from_pretrained(folder)
    save_file(whole, path)
    (folder / "config.json").write_text(json.dumps({"model_type": "vggt_lora", "embed_dims": 64}))
    with pytest.raises(
        WeightsError, match="config.json: unknown VGGTConfig field 'embed_dims'.*Did you mean 'embed_dim'"
    ):
        VGGT.from_pretrained(folder)


def test_saving_is_whole_or_absent(model, tmp_path, monkeypatch):
    folder = model.save_pretrained(tmp_path / "net")
    before = (folder / "model.safetensors").read_bytes()

    def dies(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", dies)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before and len(list(folder.iterdir())) == 2


def test_track_head_weights_are_held_and_saved(tmp_path):
    config = VGGTConfig.from_dict({**VGGTConfig.golden().to_dict(), "track_head": True, "track_features": 16})
    folder = VGGT(config).save_pretrained(tmp_path / "net")
    assert VGGT.from_pretrained(folder).load_report.dropped == {"track_head": 394}
    kept = VGGT.from_pretrained(folder, track_head=True)
    assert kept.load_report.dropped == {} and kept.load_report.n_loaded == 347 + 394
    with torch.no_grad():
        assert "depth" in kept(torch.rand(1, 3, 28, 28))
    with pytest.raises(NotImplementedError, match="tracking is not implemented"):
        kept(torch.rand(1, 3, 28, 28), heads=("track",))


def test_the_shipped_network_is_whole_or_named(model, tmp_path):
    """One error for every fault of a shipped network, with the file, the fault and the remedy; the rest is in
    nbs/model/embedded.
    """
    from vggt_lora.model.embedded import write_shipped
    from vggt_lora.model.weights import find_weights

    path = write_shipped(model, tmp_path, {})
    assert find_weights("tiny", shipped=tmp_path).card.config == model.config
    report = VGGT.from_pretrained(path).load_report
    assert report.converted == report.n_loaded == len(model.state_dict()) and "converted from float16" in str(report)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="tiny.safetensors: .* the file was cut short$"):
        VGGT.from_pretrained(path)  # a file of the user's own: reinstalling would not help
    path.unlink()
    with pytest.raises(WeightsError, match="tiny.safetensors: missing; reinstall the package"):
        find_weights("tiny", shipped=tmp_path)
    save_file(model.state_dict(), path)  # beside a JSON of somebody else
    path.with_suffix(".json").write_text("[1, 2]")
    assert VGGT.from_pretrained(path).load_report.converted == 0


def adapted(model, **extra):
    from peft import LoraConfig, get_peft_model
    targets = ["aggregator.frame_blocks.2.attn.qkv", "aggregator.global_blocks.3.mlp.fc1", "depth_head.projects.1",
               "depth_head.scratch.refinenet1.resConfUnit2.conv1"]
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **extra))


@pytest.fixture
def fresh(model, tmp_path):
    return VGGT.from_pretrained(model.save_pretrained(tmp_path / "base"))


def test_peft_wraps_linear_and_conv(fresh, tmp_path):
    images = torch.rand(2, 3, 28, 42)
    with torch.no_grad():
        before = fresh(images)
        wrapped = adapted(fresh).eval()
        after = wrapped(images)
        again = wrapped(state=wrapped.encode(images, stop_after=1))
    assert torch.equal(before.depth, after.depth) and torch.equal(before.pose_enc, after.pose_enc)
    assert torch.equal(before.depth, again.depth)
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trainable) == 8 and all("lora_" in name for name in trainable)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(WeightsError, match="merge or remove adapters first"):
        fresh.save_pretrained(tmp_path / "wrong")
    merged = wrapped.merge_and_unload()
    assert merged.save_pretrained(tmp_path / "merged").is_dir()
    with torch.no_grad():
        assert torch.equal(VGGT.from_pretrained(tmp_path / "merged")(images).depth, before.depth)


@pytest.mark.parametrize("mode", [True, False])
def test_checkpointing_reaches_adapters(fresh, mode):
    """With frozen inputs a reentrant checkpoint would give no gradient; dropout must be drawn the same twice."""
    wrapped = adapted(fresh, lora_dropout=0.3).train(mode)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    images, gradients = torch.rand(2, 3, 28, 42), []
    for blocks in (False, True, 1):
        fresh.set_gradient_checkpointing(blocks)
        wrapped.zero_grad()
        torch.manual_seed(1)
        out = wrapped(images)
        (out.depth.log().square().mean() + out.pose_enc.square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, gradient in other.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, gradients[0][name], rtol=0, atol=0)


def test_gradients_flow_through_a_state(model):
    """Going on from a state with gradients equals the straight run; a detached one cuts them."""
    images = torch.rand(1, 2, 3, 28, 42)
    gradients = []
    for start in (lambda: model(images), lambda: model(state=model.encode(images, stop_after=1))):
        model.zero_grad()
        start().depth.log().mean().backward()
        gradients.append(model.aggregator.frame_blocks[0].attn.qkv.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    model.zero_grad(set_to_none=True)
    model(state=model.encode(images, stop_after=1).detach()).depth.log().mean().backward()
    assert model.aggregator.frame_blocks[1].attn.qkv.weight.grad is None
    assert model.aggregator.frame_blocks[2].attn.qkv.weight.grad is not None
    model.zero_grad(set_to_none=True)
