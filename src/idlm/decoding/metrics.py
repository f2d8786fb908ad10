"""What decoding reached, by the paper's names (arXiv 2604.11035)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DecodeStats:
    """Counts over the forwards of one request, or of many added up.

    Attributes:
        tokens: committed and kept.
        outcomes: forwards by the drafts that were tested and those of them that stood; prefill's
            last one included, which commits a token like any other.
        overlap: sum over the `reached` places of ``sum_x min(p, q)``.
        rows: in-flight rows over all forwards.
        seconds: wall time.
    """

    tokens: int = 0
    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)
    overlap: float = 0.0
    rows: int = 0
    seconds: float = 0.0

    def __add__(self, other: DecodeStats) -> DecodeStats:
        names = self.__dataclass_fields__
        return DecodeStats(**{n: getattr(self, n) + getattr(other, n) for n in names})

    @property
    def forwards(self) -> int:
        """All forwards."""
        return sum(self.outcomes.values())

    @property
    def drafted(self) -> int:
        """Drafts that were tested."""
        return sum(drafted * n for (drafted, _), n in self.outcomes.items())

    @property
    def accepted(self) -> int:
        """Drafts that stood."""
        return sum(accepted * n for (_, accepted), n in self.outcomes.items())

    @property
    def verify(self) -> int:
        """Forwards in which all drafts stood."""
        return sum(n for (drafted, accepted), n in self.outcomes.items() if drafted == accepted > 0)

    @property
    def reject(self) -> int:
        """Forwards in which a draft was rejected."""
        return sum(n for (drafted, accepted), n in self.outcomes.items() if accepted < drafted)

    @property
    def cold(self) -> int:
        """Forwards without drafts."""
        return self.outcomes[0, 0]

    @property
    def reached_at(self) -> Counter[int]:
        """By place in the block, from 1: drafts tested there with all earlier ones accepted."""
        return self._by_place(_reached)

    @property
    def accepted_at(self) -> Counter[int]:
        """By place in the block, from 1: drafts that stood."""
        return self._by_place(lambda _, accepted: accepted)

    def _by_place(self, places: Callable[[int, int], int]) -> Counter[int]:
        counts: Counter[int] = Counter()
        for outcome, n in self.outcomes.items():
            for place in range(1, places(*outcome) + 1):
                counts[place] += n
        return counts

    @property
    def reached(self) -> int:
        """Drafts tested with all earlier ones accepted."""
        return sum(self.reached_at.values())

    @property
    def tokens_per_forward(self) -> float:
        """TPF."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted share of all drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def introspective_acceptance_rate(self) -> float:
        """Mean of ``sum_x min(p, q)`` over the places whose predecessors all stood."""
        return self.overlap / self.reached if self.reached else 0.0

    @property
    def acceptance_by_place(self) -> list[float]:
        """Accepted share of place 1, 2, ... among the forwards that reached it."""
        reached_at, accepted_at = self.reached_at, self.accepted_at
        return [accepted_at[j] / reached_at[j] for j in sorted(reached_at)]

    @property
    def compute_efficiency(self) -> float:
        """``TPF^2 / query_size``."""
        return self.tokens_per_forward**2 * self.forwards / self.rows if self.rows else 0.0

    @property
    def verify_share(self) -> float:
        """Share of forwards in which all drafts stood."""
        return self.verify / self.forwards if self.forwards else 0.0

    @property
    def reject_share(self) -> float:
        """Share of forwards in which a draft was rejected."""
        return self.reject / self.forwards if self.forwards else 0.0

    @property
    def cold_share(self) -> float:
        """Share of forwards without drafts."""
        return self.cold / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens by wall time."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "tokens": self.tokens,
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "introspective_acceptance_rate": self.introspective_acceptance_rate,
            "acceptance_by_place": self.acceptance_by_place,
            "compute_efficiency": self.compute_efficiency,
            "verify_share": self.verify_share,
            "reject_share": self.reject_share,
            "cold_share": self.cold_share,
            "seconds": self.seconds,
        }


def _reached(drafted: int, accepted: int) -> int:
    """Places of a forward that were tested with all earlier ones accepted."""
    return min(accepted + 1, drafted)
