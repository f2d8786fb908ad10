"""Which layout and stride each forward of an engine has, and what they are found to cost."""

from __future__ import annotations

import time
from dataclasses import replace

from idlm.decoding.cycle import Method
from idlm.decoding.layout import Layout
from idlm.decoding.policy import Policy
from idlm.engine.commit import Launch
from idlm.engine.flights import MOST_HOST
from idlm.engine.news import News


class Plans:
    """The method's own layout, or what a policy chooses, which learns here what that costs.

    Args:
        policy: None: it is always the method's own.
    Attributes:
        layouts: all that a forward may have.
    """

    def __init__(self, method: Method, policy: Policy | None) -> None:
        self.layouts = [method.layout, *(policy.plans if policy else ())]
        self._method, self._policy = method, policy
        self._methods = {layout: replace(method, layout=layout) for layout in self.layouts}
        self._last: tuple[Layout, float] | None = None  # the last forward, if nothing came since

    @property
    def chosen(self) -> dict[str, int]:
        """How often a policy chose each plan."""
        return dict(self._policy.chosen) if self._policy else {}

    def choose(self, requests: int) -> Method:
        """What the next forward of so many requests runs with."""
        return self._methods[self._policy.choose(requests)] if self._policy else self._method

    def current(self, requests: int) -> Method:
        """What the last forward of about so many requests ran with."""
        return self._methods[self._policy.current(requests)] if self._policy else self._method

    def took(
        self, requests: int, layout: Layout, launch: Launch, start: float, *, alone: bool
    ) -> None:
        """Note what a forward takes that began at ``start``; ``alone``: without prompts."""
        if self._policy is None:
            return
        last, self._last = self._last, (layout, start) if alone else None
        # What prompts cost is no plan's doing; but where all cycles have some, there is no other.
        if not alone and self._policy.knows(requests, layout):
            return
        # Without a graph, the host is busy for as long as the forward takes.
        seconds = launch.seconds or time.perf_counter() - start
        if launch.seconds is not None and last is not None and last[0] == layout:
            # What a graph takes is not all: the host may need longer for what it brings.
            seconds = max(seconds, min(start - last[1], MOST_HOST * seconds))
        self._policy.took(requests, layout, seconds)

    def interrupt(self) -> None:
        """Note that the time until the next forward is not that of the last one alone."""
        self._last = None

    def saw(self, news: News) -> None:
        """Note how drafts went."""
        if self._policy is not None:
            self._policy.saw(*news.tested())

    def forget(self) -> None:
        """`Policy.forget`."""
        if self._policy is not None:
            self._policy.forget()
