"""Coordinate moves: every knot tried either way, and moves that help are kept."""

from __future__ import annotations

from torch import Tensor

from oss_ext.refine.base import Race, Rows


def sweep(race: Race, rows: Rows, score: Tensor, scale: int) -> tuple[Rows, Tensor]:
    """Every knot moved by ``scale`` rows as long as it helps, the last ones, which cost least,
    first."""
    knots = range(len(rows) - 2, race.first - 1, -1)
    moves = [(k, step) for k in knots for step in (scale, -scale)]
    guessed: list[Rows] = []
    for place, (k, step) in enumerate(moves):
        while race.may_go_on():
            moved = _moved(rows, k, step, race.last_row)
            if moved is None:
                break
            if moved not in guessed:
                others = (_moved(rows, *move, race.last_row) for move in moves[place + 1 :])
                guessed = race.guess([moved, *filter(None, others)])
            found = race.better(moved, score)
            if found is None:
                break
            rows, score = moved, found
    return rows, score


def _moved(rows: Rows, k: int, step: int, last_row: int) -> Rows | None:
    """``rows`` with knot ``k`` elsewhere; None where that is no path."""
    row = rows[k] + step
    above = rows[k - 1] if k else last_row + 1
    return (*rows[:k], row, *rows[k + 1 :]) if above > row > rows[k + 1] else None
