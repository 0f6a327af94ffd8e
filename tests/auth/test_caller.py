from __future__ import annotations

import asyncio
import json

import pytest

from hycluster.auth import caller
from hycluster.auth.caller import Caller, calling
from hycluster.errors import PermissionDenied, UnknownModel

ALICE = Caller("acme", "search", "laptop", frozenset({"a", "b"}), frozenset({"batch"}), 12.5)


@pytest.mark.parametrize("one", [ALICE, Caller("acme", "search", "all")], ids=["restricted", "not"])
def test_it_comes_back_from_a_record(one: Caller) -> None:
    assert Caller.from_json(json.loads(json.dumps(one.as_json()))) == one


def test_what_one_may() -> None:
    with calling(ALICE):
        caller.check_model("a")
        caller.check_scope("batch", "here")
        assert caller.usable(["c", "b", "a"]) == ["b", "a"]
        with pytest.raises(UnknownModel, match="'c' is not served here; served are 'a', 'b'"):
            caller.check_model("c")
        with pytest.raises(PermissionDenied, match="here: needs the scope 'admin'"):
            caller.check_scope("admin", "here")
        colleague, other = Caller("acme", "search", "another"), Caller("acme", "other", "laptop")
        assert [caller.is_own(each) for each in (colleague.as_json(), other.as_json(), None)] == [True, False, False]


def test_nobody_is_asked() -> None:
    caller.check_model("c")
    caller.check_scope("admin", "here")
    assert caller.caller_now() is None
    assert caller.is_own(ALICE.as_json())
    assert caller.is_own(None)


async def test_what_is_begun_for_a_caller_goes_on_for_him() -> None:
    async def owner() -> str | None:
        await asyncio.sleep(0)
        who = caller.recorded(await asyncio.to_thread(caller.caller_now))
        return who.owner if who else None

    with calling(ALICE):
        begun = asyncio.create_task(owner())
    with calling(Caller("other", "one", "key")):
        assert await begun == "acme/search"
    assert caller.current_caller.get() is None


def test_the_prefix_cache_is_a_projects_own() -> None:
    others = [Caller("acme", "other", "laptop"), Caller("acm", "e/search", "x"), Caller("umbrella", "search", "laptop")]

    def salt(one: Caller | None, asked: str | None) -> str | None:
        with calling(one):
            return caller.own_salt(asked)

    asked = (None, "", "x", "x\n", salt(ALICE, None), salt(others[0], None), salt(others[0], "x"), "acme/other")
    colleague = Caller("acme", "search", "another", scopes=frozenset({"admin"}))
    mine = [salt(ALICE, each) for each in asked]
    assert mine == [salt(colleague, each) for each in asked]
    theirs = [salt(other, each) for other in others for each in asked]
    assert len({*mine, *theirs}) == len(asked) * (1 + len(others)), "no two are equal"
    assert [salt(None, each) for each in asked] == list(asked), "where nobody is asked who he is"
