"""What decoding reached, by the paper's names (arXiv 2604.11035)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DecodeStats:
    """Counts over the forwards of one request, or of many added up.

    Attributes:
        tokens: committed and kept.
        forwards: prefill's last one included, which commits a token like any other.
        drafted, accepted: drafts tested, and those that stood.
        verify, reject, cold: forwards in which all drafts stood, one was rejected, none were
            there.
        overlap: sum over tested places of ``sum_x min(p, q)``; ``reached`` places were tested
            with all earlier ones accepted.
        rows: in-flight rows over all forwards.
        accepted_at, drafted_at: per place in the block, from 1; places after the first rejected
            one are not counted as drafted there.
        seconds: wall time.
    """

    tokens: int = 0
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    verify: int = 0
    reject: int = 0
    cold: int = 0
    overlap: float = 0.0
    reached: int = 0
    rows: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)
    reached_at: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def forward(self, drafted: int, accepted: int, overlap: list[float], rows: int) -> None:
        """Count one forward; ``overlap`` of the places up to the first rejected one."""
        self.forwards += 1
        self.rows += rows
        self.drafted += drafted
        self.accepted += accepted
        if drafted == 0:
            self.cold += 1
        elif accepted == drafted:
            self.verify += 1
        else:
            self.reject += 1
        reached = min(accepted + 1, drafted)
        self.reached += reached
        self.overlap += sum(overlap[:reached])
        for place in range(1, accepted + 1):
            self.accepted_at[place] += 1
        for place in range(1, reached + 1):
            self.reached_at[place] += 1

    def __add__(self, other: DecodeStats) -> DecodeStats:
        names = self.__dataclass_fields__
        return DecodeStats(**{n: getattr(self, n) + getattr(other, n) for n in names})

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
        places = range(1, max(self.reached_at, default=0) + 1)
        return [self.accepted_at[j] / self.reached_at[j] for j in places]

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
