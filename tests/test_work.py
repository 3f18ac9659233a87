"""Files shared among processes by claims."""

from snac48.work import SharedWork


def test_two_claims_at_once(tmp_path):
    """SharedWork for a program that reads ahead: claims are kept, given back and committed one by one."""
    work = SharedWork(tmp_path, [f"{i}" for i in range(6)], 2, {}, print)
    assert work.claim(0) and work.claim(1) and not work.claim(0)
    work.commit(0, {"rows": []})
    assert work.still_ours(1) and work.unfinished() == 2
    work.release(1)
    assert work.claim(1) and work.claim(2)
    work.release()
    assert work.claims == {} and not list((tmp_path / "work").glob("unit_000002*.claim"))
    work.close()


def test_a_unit_that_another_has_taken_over_is_not_given_back(tmp_path):
    """We slept, generation 1 works: without our generation 0 the unit would seem free."""
    work = SharedWork(tmp_path, ["a"], 1, {}, print)
    assert work.claim(0)
    (tmp_path / "work" / "unit_000000.0001.claim").write_text("{}")
    assert not work.still_ours(0)
    work.release()
    assert work.claims == {} and (tmp_path / "work" / "unit_000000.0000.claim").exists()
    work.close()
