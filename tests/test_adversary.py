"""Wrong input by the hundred: each ends in a message that names the place, in a visible exclusion, or in the same
result.
"""
import collections

import pytest

from tests.adversary.attack import Attack, run, write
from tests.adversary.catalogue import ATTACKS, bases, chosen, outcomes
from vggt_lora.core import SceneError


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("attacks")


@pytest.fixture(scope="module")
def places(room):
    return bases(room)


def test_there_are_many_and_each_has_a_name_of_its_own():
    titles = [attack.title for _, attack in chosen()]
    assert len(titles) >= 300 and len(set(titles)) == len(titles), [
        t for t, n in collections.Counter(titles).items() if n > 1
    ]
    assert all(ATTACKS.values())


def test_no_attack_ends_badly(places, room):
    bad = [f"{o.attack.title}: {o.text}" for o in outcomes(places, room) if not o.good]
    assert not bad, "\n".join(bad)


def test_the_judge_can_condemn(tmp_path):
    """A silent difference, a bare traceback and a message without a name are bad."""
    base = tmp_path / "base"
    write(base / "a.txt", "1")
    expected = ("1", [])

    def judge(use, data=False):
        return run(
            Attack("group", "name", lambda folder: write(folder / "a.txt", "2"), use, data), base, tmp_path, expected
        ).kind

    def fails(error):
        def use(folder):
            raise error
        return use

    assert judge(lambda folder: ((folder / "a.txt").read_text(), [])) == "bad"
    assert judge(lambda folder: ((folder / "a.txt").read_text(), []), data=True) == "data"
    assert judge(lambda folder: ((folder / "a.txt").read_text(), ["one left out"])) == "told"
    assert judge(lambda folder: ("1", [])) == "same"
    assert judge(fails(SceneError("a.txt is broken"))) == "refused"
    assert judge(fails(SceneError("something is broken"))) == "bad"
    assert judge(fails(KeyError("a.txt"))) == "bad"
    assert (base / "a.txt").read_text() == "1"  # the copies never touch what they were copied from
