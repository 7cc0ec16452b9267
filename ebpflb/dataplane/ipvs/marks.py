"""Which firewall mark is whose: the virtual servers that are not found by an address.

Rules of this file: pure. A frontend's mark stays its own as long as it needs one, also over a restart; a mark is given
again when its virtual server is gone, and not before: the lowest first.
"""

from __future__ import annotations

from collections.abc import Iterable

from ebpflb.dataplane.ipvs.names import MARK_LIMIT, Mark
from ebpflb.dataplane.ipvs.table import Refusal, Rows, Server
from ebpflb.routes import Frontend, RouteTable, Scope


class Marks:
    """The marks of one network namespace, by frontend and scope."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self._marks: dict[tuple[Frontend, Scope], int] = {}
        self._taken: set[int] = set()
        self._lowest = 0

    def clear(self) -> None:
        """Before what the kernel holds is taken over."""
        self._marks, self._taken, self._lowest = {}, set(), 0

    def are_ours(self, mark: int) -> bool:
        return self._mark.number(mark) is not None

    def given(self, frontend: Frontend, scope: Scope) -> int:
        """The mark of the frontend's own virtual server for a scope. Raises Refusal if there are no more."""
        found = self._marks.get((frontend, scope))
        if found is None:
            while self._lowest in self._taken:
                self._lowest += 1
            if self._lowest > MARK_LIMIT:
                raise Refusal("there are no more firewall marks")
            found = self._marks[frontend, scope] = self._mark.of(self._lowest)
            self._taken.add(self._lowest)
        return found

    def adopt(self, frontend: Frontend, scope: Scope, mark: int) -> None:
        """The kernel's rows say so."""
        number = self._mark.number(mark)
        if number is not None and number not in self._taken:
            self._taken.add(number)
            self._marks[frontend, scope] = mark

    def take(self, mark: int) -> None:
        """A virtual server has it that is nobody's any more."""
        number = self._mark.number(mark)
        if number is not None:
            self._taken.add(number)

    def forget(self, frontend: Frontend, rows: Rows | None) -> None:
        """What the frontend does not need any more."""
        for scope in Scope:
            mark = self._marks.get((frontend, scope))
            if mark is not None and (rows is None or not any(server.mark == mark for server in rows.servers)):
                del self._marks[frontend, scope]

    def release(self, mark: int) -> None:
        """The virtual server of the mark is gone."""
        number = self._mark.number(mark)
        if number is not None:
            self._taken.discard(number)
            self._lowest = min(self._lowest, number)

    def keep(self, routes: RouteTable, leaving: Iterable[Server]) -> None:
        """Of the marks that were taken over, those in use."""
        self._marks = {each: mark for each, mark in self._marks.items() if each in routes}
        used = {*self._marks.values(), *(server.mark for server in leaving)}
        self._taken = {number for mark in used if (number := self._mark.number(mark)) is not None}
        self._lowest = 0

    def owner(self, mark: int) -> Frontend | None:
        """Whose virtual server has that mark."""
        return next((frontend for (frontend, _), given in self._marks.items() if given == mark), None)
