"""What an adapter file or a choice of layers may do wrong, and that a refusal leaves the model as it was."""
import copy
import json
from pathlib import Path

import pytest
import torch
from chapters import run_here

from vggt_lora.adapters.adapter import BASE_FILE, apply_lora, fingerprint, load_adapter, merge, save_adapter
from vggt_lora.core import ConfigError, VggtLoraError, WeightsError
from vggt_lora.lora import inspect_targets
from vggt_lora.model.vggt import VGGT, VGGTConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VGGT(VGGTConfig.golden()).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(1, 2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(base, tmp_path):
    """A saved adapter with a layer in full beside it."""
    adapted, _ = apply_lora(copy.deepcopy(base), "a", rank=2, full_finetune=["depth_head.norm"], seed=0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.01)
    return save_adapter(adapted, tmp_path / "adapter")


def refused(base, images, folder, kind=WeightsError, **options) -> str:
    """Refuse `folder`, check that the model is what it was, and return the message."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        before = model(images)["depth"]
    with pytest.raises(kind) as caught:
        load_adapter(model, folder, **options)
    assert set(model.state_dict()) == set(base.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(images)["depth"], before)
    return str(caught.value)


def change(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    content |= values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def test_the_intact_adapter_loads(base, images, folder):
    model = load_adapter(copy.deepcopy(base), folder)
    with torch.no_grad():
        assert not torch.equal(model(images)["depth"], base(images)["depth"])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    training = load_adapter(copy.deepcopy(base), folder, trainable=True)
    names = {n for n, p in training.named_parameters() if p.requires_grad}
    assert names and all("lora_" in n or "modules_to_save" in n for n in names)


@pytest.mark.parametrize(
    "values, word",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"), ({"peft_type": ...}, "peft_type is None"),
        ({"peft_type": 3}, "peft_type is 3"), ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_alpha": None}, "lora_alpha"), ({"lora_dropout": "x"}, "lora_dropout"), ({"r": "4"}, "r is '4'"),
        ({"r": 0}, "r is 0"), ({"r": 2.5}, "r is 2.5"), ({"r": True}, "r is True"), ({"r": ...}, "r is None"),
        ({"target_modules": 5}, "target_modules is 5"), ({"target_modules": ...}, "target_modules is None"),
        ({"target_modules": [1]}, "target_modules"), ({"target_modules": "("}, "does not fit"),
        ({"target_modules": ["no_such_layer"]}, "does not fit"),
        ({"modules_to_save": "depth_head.norm"}, "modules_to_save"), ({"modules_to_save": [None]}, "modules_to_save"),
        ({"r": 3}, "shape"), ({"modules_to_save": None}, "unexpected"),
        ({"task_type": "NOTHING"}, "adapter_config.json"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_wrong_configuration_is_refused_by_name(base, images, folder, values, word):
    change(folder / "adapter_config.json", **values)
    message = refused(base, images, folder)
    assert word in message and str(folder) in message


@pytest.mark.parametrize("name", ["adapter_config.json", BASE_FILE])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"text"', "\udcff"])
def test_a_file_that_holds_no_settings_is_refused(base, images, folder, name, text):
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert name in refused(base, images, folder)


@pytest.mark.parametrize("mark", [7, [], {"a": 1}, None, True])
def test_a_fingerprint_that_is_no_text_is_refused(base, images, folder, mark):
    change(folder / BASE_FILE, base_fingerprint=mark)
    assert "base_fingerprint" in refused(base, images, folder)


def test_tensors_that_do_not_fit_are_refused(base, images, folder):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    # older safetensors leave them mapped to the file that is written below
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    name = sorted(tensors)[0]
    for changed, word in [({k: v for k, v in tensors.items() if k != name}, "1 keys missing"),
                          (tensors | {"extra": torch.zeros(2)}, "1 unexpected"),
                          (tensors | {name: torch.zeros(3, 3)}, "has shape (3, 3)"),
                          (tensors | {name: tensors[name] * float("inf")}, "NaN or infinity"), ({}, "keys missing")]:
        save_file(changed, path)
        assert word in refused(base, images, folder)
    path.write_bytes(b"\x00" * 50)
    assert "cannot be read" in refused(base, images, folder)


def test_another_base_is_refused(base, images, folder):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.aggregator.frame_blocks[0].attn.qkv.weight[5, 7] *= 1 + 1e-6
    with pytest.raises(WeightsError, match="another base"):
        load_adapter(other, folder)
    load_adapter(other, folder, any_base=True)  # the refused model still takes it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_single_value_changes_the_fingerprint(base, dtype):
    model = copy.deepcopy(base).to(dtype)
    mark, generator = fingerprint(model), torch.Generator().manual_seed(3)
    assert fingerprint(copy.deepcopy(model)) == mark
    parameters = [p.data.reshape(-1) for p in model.parameters()]
    for _ in range(20):
        flat = parameters[int(torch.randint(len(parameters), (1,), generator=generator))]
        place = int(torch.randint(len(flat), (1,), generator=generator))
        old = flat[place].clone()
        flat[place] = old * (1 + 2 * torch.finfo(dtype).eps) if old else torch.finfo(dtype).tiny
        assert flat[place] != old and fingerprint(model) != mark
        flat[place] = old
    assert fingerprint(model) == mark


# --- choices --------------------------------------------------------------------------------------------------------

def test_a_second_adapter_is_refused(base, folder):
    adapted, _ = apply_lora(copy.deepcopy(base), "a", rank=2)
    loaded = load_adapter(copy.deepcopy(base), folder)
    for model in (adapted, adapted.get_base_model(), loaded, loaded.get_base_model()):
        names = list(model.state_dict())
        with pytest.raises(ConfigError, match="has an adapter already"):
            apply_lora(model, "b")
        with pytest.raises(ConfigError, match="has an adapter already"):
            load_adapter(model, folder)
        assert list(model.state_dict()) == names
    again, _ = apply_lora(merge(loaded), "b", rank=2)  # once merged it is a plain model
    assert any(p.requires_grad for p in again.parameters())


CHOICES = [
    ({"strategy": "b", "target_modules": ["depth_head"]}, "has its own"),
    ({"strategy": "custom"}, "needs target_modules"),
    ({"strategy": "custom", "target_modules": " , "}, "needs target_modules"),
    ({"strategy": "b", "rank": 0}, "at least 1"),
    ({"strategy": "b", "rank": -3}, "at least 1"),
    ({"strategy": "b", "rank": 2.5}, "at least 1"),
    ({"strategy": "z"}, "choose one of"),
    ({"strategy": "a", "full_finetune": ["depth_head"]}, "nothing is left for adapters"),
    ({"strategy": "custom", "target_modules": "depth_head.norm"}, "cannot be adapted"),
    ({"strategy": "custom", "target_modules": "depth_heda"}, "Did you mean 'depth_head'"),
    ({"strategy": "a", "full_finetune": "depth_head.nrom"}, "full pattern"),
]


@pytest.mark.parametrize("choice, word", CHOICES, ids=[w for _, w in CHOICES])
def test_inspecting_refuses_what_applying_refuses(base, choice, word):
    messages = []
    for function in (inspect_targets, apply_lora):
        model = copy.deepcopy(base)
        with pytest.raises(VggtLoraError, match=word) as caught:
            function(model, **choice)
        assert isinstance(caught.value, ConfigError) and set(model.state_dict()) == set(base.state_dict())
        messages.append(str(caught.value))
    assert messages[0] == messages[1] or "rank" in choice


@pytest.mark.parametrize(
    "targets",
    ["depth_head.scratch,camera_head", " depth_head.scratch , camera_head, ", ["depth_head.scratch", " camera_head"]],
)
def test_blanks_between_patterns_do_not_matter(base, targets):
    seen = inspect_targets(base, "custom", target_modules=targets, full_finetune=" depth_head.norm ,")
    _, applied = apply_lora(copy.deepcopy(base), "custom", target_modules=targets, full_finetune=" depth_head.norm ,")
    assert (
        seen == applied
        and seen.patterns == ("depth_head.scratch", "camera_head")
        and seen.named("full") == ["depth_head.norm"]
    )


# --- the notebook ---------------------------------------------------------------------------------------------------

def test_notebook_02_stops_at_a_wrong_parameter():
    """A variable of the notebook that is no parameter."""
    fault = run_here("02_lora", STRATEGIES="a").fault
    assert fault.startswith("ConfigError") and "unknown parameter 'STRATEGIES'" in fault
