"""All attacks by name, and the good input that they begin from."""
from collections.abc import Iterator
from pathlib import Path

from tests.adversary import network_attacks, run_attacks, scene_attacks
from tests.adversary.attack import Attack, Outcome, copy_of, run

SCENES = [
    *scene_attacks.colmap_text_attacks(), *scene_attacks.photo_attacks(), *scene_attacks.mask_attacks(),
    *scene_attacks.laser_attacks(), *scene_attacks.layout_attacks(),
]
BINARY = scene_attacks.colmap_binary_attacks()
NETWORK = [*network_attacks.weights_attacks(), *network_attacks.adapter_attacks()]
ATTACKS: dict[str, list[Attack]] = {
    "scene": [*SCENES, *run_attacks.split_attacks(), *run_attacks.generated_attacks()],
    "binary scene": BINARY,
    "network": NETWORK,
    "store": run_attacks.store_attacks(),
    "nothing": run_attacks.parameter_attacks(),
    **run_attacks.kept_attacks(),
}  # name of the base -> attacks on a copy of it


def bases(room: Path) -> dict[str, Path]:
    """Make the good input once: a small scene in the whole ETH3D layout, the same with a binary model, a network with
    an adapter, a filled store.
    """
    from vggt_lora.demo.demo_scenes import demo_scene

    scene = demo_scene(room / "base", "small_house", 4, (84, 126), seed=3, style="plaster", layout="corner")
    binary = copy_of(scene, room / "binary" / "small_house")
    scene_attacks.to_binary(binary)
    nothing = room / "nothing"
    nothing.mkdir()
    return {
        "scene": scene, "binary scene": binary, "network": network_attacks.make_base(room / "network"),
        "store": run_attacks.make_store(scene, room / "store"), "nothing": nothing,
        "checkpoint": run_attacks.make_checkpoint(room / "checkpoint"),
        "prefix": run_attacks.make_prefix(room / "prefix"),
    }


def chosen(words=()) -> list[tuple[str, Attack]]:
    """(base, attack) of the groups whose names hold one of the words; all without words."""
    return [
        (base, attack)
        for base, attacks in ATTACKS.items()
        for attack in attacks
        if not words or any(w in attack.title for w in words)
    ]


def outcomes(
    places: dict[str, Path],  # of bases
    room: Path,  # for copies
    words=(),
) -> Iterator[Outcome]:
    """Carry out the attacks one after the other."""
    expected = {}
    for base, attack in chosen(words):
        key = base, attack.use
        if key not in expected:
            expected[key] = attack.use(copy_of(places[base], room / "good"))
            again = attack.use(copy_of(places[base], room / "good"))
            assert again == expected[key], f"the same input twice gives two results under {attack.use.__name__}"
        yield run(attack, places[base], room, expected[key])
