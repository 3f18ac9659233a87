"""Files shared among processes by claims."""

from snac48.work import SharedWork


def test_two_claims_at_once(tmp_path):
    """SharedWork for a program that reads ahead: claims are kept, given back and committed one by one."""
    work = SharedWork(tmp_path, [f"{i}" for i in range(6)], 2, {})
    assert work.claim(0) and work.claim(1) and not work.claim(0)
    work.commit(0, {"rows": []})
    assert work.still_ours(1) and work.unfinished() == 2
    work.release(1)
    assert work.claim(1) and work.claim(2)
    work.release()
    assert work.claims == {} and not list((tmp_path / "work").glob("unit_000002*.claim"))
    work.close()
