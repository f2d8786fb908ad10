"""Rows of a forward: how many, where they stand, what they see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from idlm.decoding.layout import Layout, row_tables
from idlm.errors import InvalidRequestError

layouts = st.builds(
    Layout.named, st.sampled_from(("ar", "linear", "quadratic")), st.integers(1, 16)
)


def test_row_counts_are_the_papers() -> None:
    assert Layout.named("ar", 4).num_rows == 1
    assert [Layout.named("linear", n).num_rows for n in (2, 4, 8)] == [3, 7, 15]
    assert [Layout.named("quadratic", n).num_rows for n in (2, 4, 8)] == [4, 16, 64]


def test_stride_one_is_autoregression() -> None:
    assert Layout.named("linear", 1) == Layout.named("quadratic", 1) == Layout.named("ar", 9)


def test_linear_is_purely_causal() -> None:
    rows = Layout.named("linear", 4).rows_by_drafts[3]
    assert rows.offsets == (0, 1, 2, 3, 4, 5, 6)
    assert torch.equal(torch.tensor(rows.visible), torch.ones(7, 7, dtype=torch.bool).tril())


@given(layouts, st.data())
def test_every_row_sees_exactly_the_text_before_it(layout: Layout, data: st.DataObject) -> None:
    """A row sees itself, and one row for each position between pending and its own."""
    drafts = data.draw(st.integers(0, layout.stride - 1))
    rows = layout.rows_by_drafts[drafts]
    for r in range(layout.num_rows):
        seen = [c for c in range(layout.num_rows) if rows.visible[r][c]]
        assert r in seen
        if 0 < r < layout.stride and r > drafts:  # an empty draft place
            assert seen == [r]
            continue
        assert sorted(rows.offsets[c] for c in seen) == list(range(rows.offsets[r] + 1))
        clean = [c for c in seen if c < layout.stride]
        assert clean == list(range(len(clean)))
        assert all(c <= drafts for c in clean)


@given(layouts, st.data())
def test_the_block_used_starts_at_the_token_being_sampled(
    layout: Layout, data: st.DataObject
) -> None:
    drafts = data.draw(st.integers(0, layout.stride - 1))
    rows = layout.rows_by_drafts[drafts]
    for accepted in range(drafts + 1):
        block = rows.block_after[accepted]
        if block < 0:
            assert (layout.name != "quadratic" and accepted < drafts) or layout.name == "ar"
            continue
        first = layout.stride + block * layout.block_size
        assert rows.offsets[first] == accepted + 1
        seen = [c for c in range(layout.stride) if rows.visible[first][c]]
        assert seen == list(range(accepted + 1))


def test_quadratic_is_never_cold() -> None:
    for rows in Layout.named("quadratic", 5).rows_by_drafts[4:]:
        assert min(rows.block_after) >= 0


def test_tables_hold_the_rows() -> None:
    layout = Layout.named("quadratic", 3)
    tables = row_tables(layout, torch.device("cpu"))
    for drafts, rows in enumerate(layout.rows_by_drafts):
        assert tables.offsets_NR[drafts].tolist() == list(rows.offsets)
        assert tables.visible_NRR[drafts].tolist() == [list(row) for row in rows.visible]
        assert tables.block_after_NN[drafts].tolist() == list(rows.block_after)


@pytest.mark.parametrize("stride", [0, -1, 17, 2.0, True, "4"])
def test_stride_out_of_range_is_refused(stride: object) -> None:
    with pytest.raises(InvalidRequestError, match="stride"):
        Layout.named("linear", stride)  # type: ignore[arg-type]


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="layout must be one of ar, linear, quadratic"):
        Layout.named("cubic", 4)
