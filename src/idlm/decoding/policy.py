"""Which layout and stride the next forward has: the one that brings most tokens a second.

What a forward costs is measured, by the number of requests; what it brings follows from how often
drafts stand at each place. Both rules of verification are exact for any drafts, so a plan may
follow any other: what it does not need of the drafts that there are is cut off.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from idlm.decoding.layout import Layout

# Another plan has to be better by this factor; forwards until it is asked again.
BETTER, PATIENCE = 1.05, 8
# What is assumed of the first place, and how many observations that is worth.
ACCEPTANCE, WORTH = 0.8, 8.0
# Forwards before a plan's cost is believed: the first ones set up what is needed.
TRIES = 3
# What a further row is taken to cost at least, of what a row has cost on average so far: the first
# masks bring the sampler head with them, the next ones may fit beside.
FURTHER = 0.25
# Observations of a place that count; older ones fade.
MEMORY = 1000.0
STRIDES = {"linear": (2, 4), "quadratic": (2, 3, 4, 6, 8)}


def plans(block_size: int) -> tuple[Layout, ...]:
    """What is to be chosen from, for a model whose mask blocks were trained with so many masks."""
    named = [Layout.named(name, n) for name, strides in STRIDES.items() for n in strides]
    return (Layout.named("ar", 1), *(x for x in named if x.block_size <= block_size))


class Policy:
    """Chooses among ``plans``, by what it was told; engines of one model may share it.

    Attributes:
        chosen: how often each plan was chosen, by its name and stride (``quadratic:4``).
    """

    def __init__(self, plans: Sequence[Layout]) -> None:
        self.plans = sorted(plans, key=lambda plan: plan.num_rows)
        self._names = {plan: f"{plan.name}:{plan.stride}" for plan in self.plans}
        self._seconds: dict[tuple[int, Layout], float] = {}
        self._tries: Counter[tuple[int, Layout]] = Counter()
        self.forget()

    def forget(self) -> None:
        """Forget the texts, but not what forwards cost."""
        self.chosen: Counter[str] = Counter()
        places = max(plan.block_size for plan in self.plans)
        self._reached, self._accepted = [0.0] * places, [0.0] * places
        # By the number of requests: the plan, and forwards until it is asked again.
        self._current = defaultdict[int, tuple[Layout, int]](lambda: (self.plans[0], 0))

    def choose(self, requests: int) -> Layout:
        """The plan of the next forward of so many requests."""
        size = _size(requests)
        plan, left = self._current[size]
        if left == 0:
            plan, left = self._best(size, plan), PATIENCE
        # A plan whose cost is not known yet is asked about again at once.
        self._current[size] = (plan, left - 1 if self._known(size, plan) else 0)
        self.chosen[self._names[plan]] += 1
        return plan

    def current(self, requests: int) -> Layout:
        """The plan of the last forward of about so many requests."""
        return self._current[_size(requests)][0]

    def took(self, requests: int, plan: Layout, seconds: float) -> None:
        """Note what a forward of so many requests cost."""
        key = _size(requests), plan
        before = self._seconds.get(key, seconds)
        if self._tries[key] < TRIES:
            self._tries[key] += 1
            self._seconds[key] = min(before, seconds)
            return
        # What took longer than before may have been disturbed, or the first to be set up.
        share = 0.5 if seconds < before else 0.05
        self._seconds[key] = before + share * (seconds - before)

    def knows(self, requests: int, plan: Layout) -> bool:
        """Whether it was told often enough what a forward of so many requests costs."""
        return self._known(_size(requests), plan)

    def saw(self, tested: Sequence[int], stood: Sequence[int]) -> None:
        """Note how drafts went in some forwards.

        Args:
            tested: by place, how many were tested with all before them standing.
            stood: how many of those stood.
        """
        places = range(len(self._reached))
        for place, reached, accepted in zip(places, tested, stood, strict=False):
            if reached:
                fade = (1.0 - 1.0 / MEMORY) ** reached
                worth = MEMORY * (1.0 - fade)
                self._reached[place] = self._reached[place] * fade + worth
                self._accepted[place] = self._accepted[place] * fade + worth * accepted / reached

    def acceptance(self) -> list[float]:
        """The chance that a draft at each place stands if all before it do."""
        chances, before = [], ACCEPTANCE
        for accepted, reached in zip(self._accepted, self._reached, strict=True):
            before = (accepted + WORTH * before) / (reached + WORTH)
            chances.append(before)
        return chances

    def tokens(self, plan: Layout) -> float:
        """Tokens that a forward is expected to bring."""
        return _tokens(plan, self.acceptance())

    def _known(self, size: int, plan: Layout) -> bool:
        return self._tries[size, plan] >= TRIES

    def _best(self, size: int, current: Layout) -> Layout:
        chances = self.acceptance()
        rates = {
            plan: _tokens(plan, chances) / self._seconds[size, plan]
            for plan in self.plans
            if self._known(size, plan)
        }
        best = max(rates.values(), default=0.0)
        known: list[tuple[int, float]] = []  # rows and seconds, which more rows never lower
        for plan in self.plans:
            if plan in rates:
                before = known[-1][1] if known else 0.0
                known.append((plan.num_rows, max(before, self._seconds[size, plan])))
            elif not known or _tokens(plan, chances) / _least(known, plan.num_rows) > best * BETTER:
                return plan
        first = rates[self.plans[0]]
        # To stay with what is a little worse than another plan is all right, but not than the one
        # that works without drafts.
        if current in rates and best <= rates[current] * BETTER and rates[current] >= first:
            return current
        return max(rates, key=lambda plan: rates[plan])


def _tokens(plan: Layout, chances: Sequence[float]) -> float:
    """Tokens that a forward brings if a draft at each place stands with these chances."""
    stood, drafts = 1.0, 0.0
    for chance in chances[: plan.block_size]:
        stood *= chance
        drafts += stood
    if plan.name == "linear":
        # After a rejection comes a forward without drafts, after which there are some again.
        return 1.0 + drafts / (2.0 - stood)
    return 1.0 + drafts


def _least(known: Sequence[tuple[int, float]], rows: int) -> float:
    """Seconds that so many rows are taken to cost at least, given what fewer rows cost."""
    (fewest, cheapest), (most, dearest) = known[0], known[-1]
    return dearest + FURTHER * (dearest - cheapest) / max(most - fewest, 1) * (rows - most)


def _size(requests: int) -> int:
    """Numbers of requests that are told apart: powers of two."""
    return (requests - 1).bit_length()
