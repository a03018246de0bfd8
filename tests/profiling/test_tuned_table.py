"""The tuned table: what is merged into it, and that flexlocal reads what is written."""

import json

from flexlocal import tuning
from flexlocal.tuning import TABLE
from profiling.tuned_table import SHIPPED, merged, old_flash, read_table, text_of


def entry(reach=257, flash=False, capability=(9, 0), head_size=64, **more):
    numbers = {"capability": list(capability), "head_size": head_size, "reach": reach}
    options = {"fwd_BLOCK_M": 64, "bwd_num_warps": 4, "bwd_USE_TMA": True}
    where = {"device": "a GPU", "torch": "2.11.0"}
    return {
        "problem": "p",
        **numbers,
        "block": 64,
        "one_list": True,
        "flash": flash,
        **where,
        "options": options,
    } | more


def test_an_entry_is_added_replaced_and_the_others_stay():
    first, second = entry(257), entry(1025)
    table = merged(merged(None, first), second)
    assert table["entries"] == [first, second]
    assert (table["device"], table["torch"]) == ("a GPU", "2.11.0")
    better = entry(257, block=128, device="another GPU")
    again = merged(table, better)
    assert again["entries"] == [better, second]
    assert again["device"] == "a GPU"
    assert table["entries"] == [first, second]  # as it was
    for other in (entry(258), entry(capability=(10, 0)), entry(head_size=128)):
        assert merged(table, other)["entries"] == [first, second, other]


def test_a_table_is_read_by_flexlocal(tmp_path, monkeypatch):
    table = merged(read_table(SHIPPED), entry(999, flash=True, capability=(10, 3)))
    (tmp_path / "tuned.json").write_text(text_of(table))
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    *others, last = tuning._table()
    assert tuple(others) == TABLE
    assert (last.capability, last.head_size, last.reach, last.flash) == ((10, 3), 64, 999, True)
    assert (last.tuning.block, last.tuning.one_list) == (64, True)
    assert last.tuning.options == (("bwd_USE_TMA", True), ("bwd_num_warps", 4), ("fwd_BLOCK_M", 64))


def test_the_text_of_a_table_is_its_json():
    for table in (json.loads(SHIPPED.read_text()), merged(None, entry())):
        assert json.loads(text_of(table)) == table
        assert len(text_of(table).splitlines()) < 8 + 10 * len(table["entries"])


def test_what_a_table_knew_of_flash():
    table = merged(merged(None, entry(257, flash=True)), entry(1025))
    assert old_flash(table, entry(257)) is True
    assert old_flash(table, entry(1025)) is False
    assert old_flash(table, entry(4097)) is False
    assert old_flash(None, entry(257)) is False


def test_a_missing_file_is_no_table(tmp_path):
    assert read_table(tmp_path / "none.json") is None
