"""What a replica that goes leaves to those that stay.

    leaver                                             heir
      Leaving: its chains used last, the hottest first ──→  fetches them, into free pages only
      all heirs have answered: it may go           ←──  Taken: has what it wants of them

Both sides, without I/O; `BlockSharing` carries messages and fetches. A leaver takes nothing from others.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from quire.kvstore.keys import BlockKey
from quire.kvstore.messages import Leaving, ReplicaId

_HOT_CHAINS = 256
"""Remembered, to be handed over."""


class HandOver:
    """One replica's part, as leaver or heir. On the engine's thread, but for `begin` and `open`."""

    def __init__(self, space: bytes) -> None:
        """`space`: `KeySpace.fingerprint`; chains of another are of no use here."""
        self._space = space
        self._chains: OrderedDict[BlockKey, tuple[BlockKey, ...]] = OrderedDict()
        """Of prompts, by their last block; the one used last at the end."""
        self._heirs: set[ReplicaId] | None = None
        """Told, and yet to answer. None: we stay."""
        self.legacy: deque[tuple[ReplicaId, tuple[BlockKey, ...]]] = deque(maxlen=4 * _HOT_CHAINS)
        """Chains that leavers offered, still to be fetched."""
        self._leavers: set[ReplicaId] = set()
        """Wait for our answer."""

    def used(self, chain: tuple[BlockKey, ...]) -> None:
        """A prompt's full blocks."""
        if chain:
            self._chains[chain[-1]] = chain
            self._chains.move_to_end(chain[-1])
            if len(self._chains) > _HOT_CHAINS:
                self._chains.popitem(last=False)

    # ---- the leaver

    def begin(self, heirs: Sequence[ReplicaId]) -> None:
        """From now on it is `open` until all of them have answered, or are gone."""
        self._heirs = set(heirs)

    @property
    def open(self) -> bool:
        """Whether an heir may still want something."""
        return bool(self._heirs)

    def will(self, heirs: Sequence[ReplicaId]) -> list[tuple[ReplicaId, Leaving]]:
        """Each chain to one of them."""
        hot = list(reversed(self._chains.values()))
        return [(heir, Leaving(self._space, tuple(hot[at :: len(heirs)]))) for at, heir in enumerate(heirs)]

    def answered(self, heir: ReplicaId) -> None:
        """It has what it wants, or is gone."""
        if self._heirs:
            self._heirs.discard(heir)

    # ---- the heir

    def offered(self, leaver: ReplicaId, leaving: Leaving) -> None:
        """Its chains are `legacy` if they are of use."""
        self._leavers.add(leaver)
        if leaving.space == self._space and self._heirs is None:
            self.legacy.extend((leaver, chain) for chain in leaving.chains)

    def satisfied(self, fetches_from: Callable[[ReplicaId], bool]) -> set[ReplicaId]:
        """Leavers of whom nothing is wanted any more; each is named once."""
        wanted = {leaver for leaver, _ in self.legacy}
        done = {leaver for leaver in self._leavers - wanted if not fetches_from(leaver)}
        self._leavers -= done
        return done
