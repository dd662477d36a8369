"""The policy: from what is known to one action."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.control.policy import Known, Load, Stay, decide


@pytest.mark.parametrize(
    ("known", "action"),
    [
        pytest.param(
            Known(),
            Stay("there is no version in the store yet"),
            id="With nothing in the store there is nothing to do.",
        ),
        pytest.param(Known(versions=(1,)), Load(1), id="The first version is loaded."),
        pytest.param(Known(versions=(1, 2, 3)), Load(3), id="At the start the newest is loaded, not the oldest."),
        pytest.param(Known(live=2, versions=(1, 2, 3)), Load(3), id="A newer version is loaded."),
        pytest.param(
            Known(live=2, versions=(2, 7, 9)), Load(9), id="Versions between the live and the newest are skipped."
        ),
        pytest.param(
            Known(live=3, versions=(1, 2, 3)),
            Stay("the newest version 3 is live"),
            id="When the newest is live, it stays.",
        ),
        pytest.param(
            Known(live=3, versions=(1, 2)),
            Stay("the newest version 3 is live"),
            id="A live version newer than all in the store stays.",
        ),
        pytest.param(
            Known(live=3),
            Stay("the store has no versions any more; still serving version 3"),
            id="A live version stays when the store is empty.",
        ),
        pytest.param(
            Known(live=5, versions=(6, 7)), Load(7), id="A live version that was pruned gives way to a newer one."
        ),
        pytest.param(
            Known(versions=(1, 2, 3), rejected=frozenset({3})),
            Load(2),
            id="At the start the newest that was not rejected is loaded.",
        ),
        pytest.param(
            Known(live=1, versions=(1, 2, 3), rejected=frozenset({3})),
            Load(2),
            id="When the newest was rejected, the next older one is loaded if it is newer than the live one.",
        ),
        pytest.param(
            Known(live=2, versions=(1, 2, 3), rejected=frozenset({3})),
            Stay("every version after the live 2 was rejected"),
            id="When all that is newer was rejected, the live version stays, and older ones are not gone back to.",
        ),
        pytest.param(
            Known(live=2, versions=(1, 2, 3, 4), rejected=frozenset({3})),
            Load(4),
            id="A rejected version does not stand in the way of the one after it.",
        ),
        pytest.param(
            Known(versions=(1, 2), rejected=frozenset({1, 2})),
            Stay("all 2 versions in the store were rejected"),
            id="When all were rejected and none is live, none goes live.",
        ),
        pytest.param(Known(live=3, versions=(1, 2, 3), pinned=1), Load(1), id="A pin rolls back."),
        pytest.param(
            Known(live=1, versions=(1, 2, 3), pinned=2), Load(2), id="A pin is obeyed though a newer version is there."
        ),
        pytest.param(Known(versions=(1, 2, 3), pinned=2), Load(2), id="At the start the pinned version is loaded."),
        pytest.param(
            Known(live=2, versions=(1, 2, 3), pinned=2),
            Stay("the pinned version 2 is live"),
            id="While the pinned version is live, newer ones wait.",
        ),
        pytest.param(
            Known(live=2, versions=(3, 4), pinned=2),
            Stay("the pinned version 2 is live"),
            id="A pinned version that is live stays even if it is gone from the store.",
        ),
        pytest.param(
            Known(live=3, versions=(1, 2, 3), pinned=9),
            Stay("the pinned version 9 is not in the store"),
            id="A pin on a version that is not there changes nothing.",
        ),
        pytest.param(
            Known(versions=(1, 2, 3), pinned=9),
            Stay("the pinned version 9 is not in the store"),
            id="At the start nothing goes live in place of a pinned version that is not there.",
        ),
        pytest.param(
            Known(live=3, versions=(1, 2, 3), pinned=1, rejected=frozenset({1})),
            Stay("the pinned version 1 was rejected"),
            id="A pin on a rejected version changes nothing.",
        ),
        pytest.param(
            Known(live=1, versions=(1, 2, 3)),
            Load(3),
            id="Without the pin that held it back, the newest is loaded again.",
        ),
        pytest.param(
            Known(versions=(1, 2, 3), waiting=frozenset({3})),
            Load(2),
            id="While the newest cannot be loaded for now, an older one goes live.",
        ),
        pytest.param(
            Known(live=2, versions=(1, 2, 3), waiting=frozenset({3})),
            Stay("version 3 could not be loaded and will be tried again; still serving version 2"),
            id="While the only newer one cannot be loaded for now, the live version stays.",
        ),
        pytest.param(
            Known(versions=(1, 2), rejected=frozenset({2}), waiting=frozenset({1})),
            Stay("version 1 could not be loaded and will be tried again"),
            id="What failed for now is hoped for, what was rejected is not.",
        ),
        pytest.param(
            Known(live=2, versions=(1, 2, 3), pinned=1, waiting=frozenset({1})),
            Stay("the pinned version 1 could not be loaded and will be tried again; still serving version 2"),
            id="A pinned version that cannot be loaded for now is waited for.",
        ),
        pytest.param(
            Known(stray=6, versions=(1, 2, 3)),
            Load(3),
            id="When the live version is not in the store as itself, the newest is loaded, though its number is lower.",
        ),
        pytest.param(
            Known(stray=3, versions=(1, 2, 3)),
            Load(3),
            id="When another version has the live one's number, it is loaded.",
        ),
        pytest.param(
            Known(stray=6, versions=(1, 2), rejected=frozenset({2})),
            Load(1),
            id="In a store begun anew, the newest that was not rejected is loaded.",
        ),
        pytest.param(
            Known(stray=6, versions=(1, 2), rejected=frozenset({1, 2})),
            Stay("all 2 versions in the store were rejected; still serving version 6, which is no longer in the store"),
            id="When no version of a store begun anew can go live, the old one keeps answering, and it is said.",
        ),
        pytest.param(
            Known(stray=6),
            Stay("the store has no versions any more; still serving version 6"),
            id="When the store was emptied, the live version keeps answering.",
        ),
        pytest.param(
            Known(stray=6, versions=(1, 2), pinned=6, pin_is_stray=True),
            Stay("the pinned version 6 is live; it is no longer in the store"),
            id="A pinned version that is live stays even when the store was begun anew.",
        ),
        pytest.param(
            Known(stray=2, versions=(1, 2, 3), pinned=2),
            Load(2),
            id="A pin means the version that has its number now, and not the live one that had it before.",
        ),
        pytest.param(
            Known(live=3, versions=(1, 2, 3), pinned=2, pin_is_foreign=True),
            Stay("the pinned version 2 is not in the store: another version has its number; still serving version 3"),
            id="A pin of a version of another store is not taken for the version that has its number here.",
        ),
    ],
)
def test_what_is_known_decides_the_action(known: Known, action: Load | Stay) -> None:
    """Each row of the table is a sentence of the policy."""
    assert decide(known) == action


numbers = st.integers(1, 12)
knowns = st.builds(
    Known,
    live=st.none() | numbers,
    versions=st.frozensets(numbers).map(sorted).map(tuple),
    pinned=st.none() | numbers,
    rejected=st.frozensets(numbers),
    waiting=st.frozensets(numbers),
)


@given(knowns)
def test_only_what_is_in_the_store_and_was_not_rejected_is_loaded(known: Known) -> None:
    """Neither a rejected version nor one that waits or is not in the store, nor the live one again, is ever loaded."""
    action = decide(known)
    if isinstance(action, Load):
        assert action.version in known.versions
        assert action.version not in known.rejected | known.waiting
        assert action.version != known.live


@given(knowns)
def test_without_a_pin_versions_only_go_up(known: Known) -> None:
    """Without a pin, the newest version that was not rejected is loaded if it is newer than the live one; nothing else is.

    Unless the live one is kept out itself, because only a pin that is gone had let it go live.
    """
    action = decide(replace(known, pinned=None))
    kept_out = known.rejected | known.waiting
    live = None if known.live in known.rejected else known.live
    candidates = [v for v in known.versions if v not in kept_out and (live is None or v > live)]
    assert (action.version if isinstance(action, Load) else None) == max(candidates, default=None)


@given(knowns.filter(lambda known: known.pinned is not None))
def test_a_pin_allows_only_its_version(known: Known) -> None:
    """With a pin, either the pinned version is loaded or none."""
    action = decide(known)
    assert isinstance(action, Stay) or action.version == known.pinned


@given(knowns)
def test_carrying_an_action_out_leads_to_rest(known: Known) -> None:
    """Once a loaded version is live, the same store asks for nothing more."""
    action = decide(known)
    if isinstance(action, Load):
        assert isinstance(decide(replace(known, live=action.version)), Stay)
