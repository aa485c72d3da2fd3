"""Temporary: what the machines are to offer."""
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.coordination.membership import Membership
from paceline.protocol.rank import Rank
from paceline.check.state import NOW

T = {
    "wake": ("_group", "_wake_due"),
    "question": ("_introductions", "_due"),
    "suspension": ("_suspension", "_due"),
    "generation": ("_generations", "_due"),
    "patience": ("_generations", "_give_up_at"),
    "lost": ("_generations", "_lost_at"),
    "silent": ("_generations", "_silent_at"),
    "scaling": ("_scaling", "_due"), "scaling-late": ("_scaling", "_deadline"),
}
Coordinator.INCIDENTAL = frozenset({"_dropped"})
Membership.INCIDENTAL = frozenset({"_members"})
Rank.INCIDENTAL = frozenset({"step", "_mid_step"})

def timers(self):
    waiting = {
        "wake": self._group.lagging(),
        "question": [*self._membership.missing(), *self._generations.silent(), *self._late()],
        "generation": [*self._generations._members],
        "suspension": self._suspension.state(self._suspension.expected(self._membership, self._generations, NOW)).waiting_for,
        "silent": [] if self._generations._spoken is None else [r for r in range(self.size) if r not in self._generations._spoken],
    }
    return {n: waiting.get(n, []) for n, (p, f) in T.items() if getattr(getattr(self, p), f) not in (None, float("inf"))}

def expire(self, name, now):
    p, f = T[name]
    setattr(getattr(self, p), f, now)

def moments_pass(self):
    self._introductions._asked = float("-inf")
    self._introductions._admitted = {}
    g = self._group
    if g._wake_due is None: g._prompt_wake = False
    if g._noticed_wave < g.wave: g._noticed_wave = -1
    gen = self._generations
    if gen._due is None: gen._give_up_at = float("inf")
    if gen._spoken is not None: gen._members = {}
    i = self._introductions
    if not [*self._membership.missing(), *self._generations.silent(), *self._late()]: i._due = None

def lives(self):
    return {m.rank: m.incarnation for m in self._membership.members()}
Coordinator.timers, Coordinator.expire, Coordinator.moments_pass, Coordinator.lives = timers, expire, moments_pass, lives
Coordinator.is_retired = lambda self, r, i: self._membership.is_retired(r, i)
Coordinator.acknowledged = lambda self, r: ((s.number, s.held) if (s := self._suspension._said.get(r)) else None)
Coordinator.epoch = lambda self: (self._generations.number, self._generations._members)
