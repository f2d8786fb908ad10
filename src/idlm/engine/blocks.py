"""Who holds which block of the KV cache; requests whose texts begin alike share blocks.

Only full blocks of committed tokens are ever shared: nobody writes into them again. They are found
by a digest of all tokens up to their end. A block that nobody holds keeps its contents until its
place is needed; then the one that was let go first is taken.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Tokens = Callable[[int, int], Sequence[int]]  # the tokens of a text from one index to another


@dataclass
class Lease:
    """The blocks that one request holds, in the order of its text.

    Attributes:
        digests: of the leading full blocks of the text, as far as they were computed; they stay
            when the blocks are given back.
        shareable: leading blocks of ``ids`` that others may hold too: they are not written again.
        watched: whether somebody has to know when its blocks change.
    """

    ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    shareable: int = 0
    watched: bool = False


class BlockPool:
    """Accounts for ``num_blocks`` blocks of ``block_tokens`` tokens; block 0 is nobody's.

    Attributes:
        changes: how often a watched lease has got blocks or has given them back.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.evictions = self.changes = 0
        self._holders = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, 0, -1))
        # Full blocks that nobody holds, the oldest first. A plain dict would go over all that were
        # taken before, whenever the oldest is wanted.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def capacity(self) -> int:
        """Tokens that fit into all blocks."""
        return (self.num_blocks - 1) * self.block_tokens

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - 1 - self.available

    def share(self, lease: Lease, tokens: Tokens, count: int) -> int:
        """Let an empty lease hold what is cached of the first ``count`` blocks of its text.

        Returns:
            The tokens in them.
        """
        assert not lease.ids
        for digest in self._digests(lease, tokens, count):
            block = self._block_of.get(digest)
            if block is None:
                break
            self._idle.pop(block, None)
            self._holders[block] += 1
            lease.ids.append(block)
        lease.shareable = len(lease.ids)
        self.changes += lease.watched
        return lease.shareable * self.block_tokens

    def grow(self, lease: Lease, length: int, spare: int = 0) -> bool:
        """Add blocks until ``lease`` holds ``length`` tokens, if ``spare`` blocks are then left.

        Returns:
            Whether it holds them; if not, nothing has changed.
        """
        more = -(-length // self.block_tokens) - len(lease.ids)
        if more <= 0:
            return True
        if more + spare > self.available:
            return False
        self.changes += lease.watched
        lease.ids += [self._take() for _ in range(more)]
        return True

    def commit(self, lease: Lease, tokens: Tokens, length: int) -> None:
        """Make the blocks shareable that the first ``length`` tokens fill; they are cached."""
        full = length // self.block_tokens
        if full <= lease.shareable:
            return
        digests = self._digests(lease, tokens, full)
        for index in range(lease.shareable, full):
            # Another request may have computed the same block at the same time: one is found.
            if digests[index] not in self._block_of:
                self._block_of[digests[index]] = lease.ids[index]
                self._digest_of[lease.ids[index]] = digests[index]
        lease.shareable = full

    def release(self, lease: Lease) -> None:
        """Give all blocks back."""
        self.changes += lease.watched
        # The end of a text is of no use without its beginning, so it is let go first.
        for block in reversed(lease.ids):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._empty.append(block)
        lease.ids, lease.shareable = [], 0

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
            self.evictions += 1
        self._holders[block] = 1
        return block

    def _digests(self, lease: Lease, tokens: Tokens, count: int) -> list[bytes]:
        """Digests of the first ``count`` blocks; each one depends on all tokens before its end."""
        first, size = len(lease.digests), self.block_tokens
        new = array("q", tokens(first * size, count * size)).tobytes() if first < count else b""
        for at in range(0, len(new), size * 8):
            before = lease.digests[-1] if lease.digests else b""
            own = new[at : at + size * 8]
            lease.digests.append(hashlib.blake2b(before + own, digest_size=16).digest())
        return lease.digests[:count]
