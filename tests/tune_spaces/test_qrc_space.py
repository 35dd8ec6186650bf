"""The space of quantum reservoirs: every point is a reservoir, within the qubits that are allowed."""

import pytest

from library.errors import InputError
from library.qrc.reservoir import QuantumReservoir
from tune_spaces.qrc import first_guesses, onion, pool, refined, reservoir, unrefined


def test_every_size_and_mode_makes_a_reservoir_within_the_limit():
    varies = pool(most_qubits=4)
    point = first_guesses(4)[0]
    assert point.keys() == varies.keys()
    for size in varies["size"].values:
        for mode in varies["mode"].values:
            for encoding in varies["encoding"].values:
                member = reservoir({**point, "size": size, "mode": mode, "encoding": encoding})
                assert member.qubits <= 4
                assert member.measured_qubits == (member.qubits if mode == "feedback" else int(size[2:]))
    assert [reservoir(guess).sigma for guess in first_guesses()] == [0.1, 0.3, 1.0]
    with pytest.raises(InputError, match="most_qubits 2: a reservoir has at least 3"):
        pool(2)


def test_the_first_variants_are_the_members_as_they_are():
    members = [QuantumReservoir(sigma=0.3, scale=0.7), QuantumReservoir(mode="feedback", feedback=2.0)]
    without, layered = unrefined(2)
    assert without.keys() == layered.keys() == onion(2).keys()
    assert refined(members, without) == members
    moved = refined(members, {**without, "0.sigma": 2.0, "1.feedback": 0.5, "1.bias": 0.1})
    assert (moved[0].sigma, moved[1].feedback, moved[1].bias) == pytest.approx((0.6, 1.0, -0.21))
