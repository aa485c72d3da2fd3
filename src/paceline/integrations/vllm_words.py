"""What vLLM's ranks said last, and what it means to the coordinator's machine; `vllm_translation.py` says why."""

from __future__ import annotations

from paceline.integrations.vllm_codec import RankStats
from paceline.protocol.coordination.wave import Observed
from paceline.protocol.messages import (
    PROTOCOL_VERSION,
    FromRank,
    Load,
    RankHello,
    RankReport,
    StartWave,
    WaveComplete,
)

LIFE = 1
"""The incarnation of every rank: under vLLM there is one."""
ADDRESS = "tcp://vllm"
KV_PARTS = 2**40
"""vLLM says the used share of KV; the machine counts tokens."""
NOTHING = Observed(-1, False)


class RankWords:
    """The last words of `size` ranks. `proof_step`: `VllmDialect`."""

    def __init__(self, size: int, *, lockstep: bool, proof_step: int) -> None:
        self.size = size
        self.proved = -1
        """The last wave of which it is known that all ranks run in it, or have."""
        self._lockstep = lockstep
        self._proof_step = proof_step
        self._said: dict[int, Observed] = {}
        self._reports: dict[int, RankReport] = {}

    def hellos(self, wave: int) -> list[FromRank]:
        """All ranks introduce themselves as they stand by what they said last; those that said nothing of this wave or
        a later one are paused before it. Their last reports follow.
        """
        said = ((rank, self._said.get(rank, NOTHING)) for rank in range(self.size))
        states = [(rank, state if state.wave >= wave else Observed(wave, False)) for rank, state in said]
        hellos = [RankHello(PROTOCOL_VERSION, rank, LIFE, ADDRESS, True, at.wave, at.running) for rank, at in states]
        return [*hellos, *self._reports.values()]

    def resize(self, size: int) -> None:
        """There are so many ranks now. Of new ones nothing is known."""
        self.size = size
        self.proved = -1
        self._said = {rank: said for rank, said in self._said.items() if rank < size}
        self._reports = {rank: report for rank, report in self._reports.items() if rank < size}

    def report(self, rank: int, stats: RankStats) -> RankReport:
        """A load report."""
        load = Load(
            stats.num_waiting_reqs, stats.num_running_reqs, kv_used=round(stats.kv_cache_usage * KV_PARTS),
            kv_total=KV_PARTS,
        )  # fmt: skip
        if not self._lockstep:
            self._reports[rank] = plain = RankReport(rank, LIFE, 0, 0, False, load)
            return plain
        wave, step = stats.current_wave, stats.step_counter
        works = stats.num_waiting_reqs + stats.num_running_reqs > 0 or step > 0
        runs = works or self._said.get(rank) == Observed(wave, True)
        self._says(rank, wave, runs)
        # A step is of its wave: across waves they are in order of both.
        self._reports[rank] = report = RankReport(rank, LIFE, wave << 32 | step, wave, runs, load)
        return report

    def proves(self, stats: RankStats) -> bool:
        """Whether this report shows that all ranks run in its wave, and that is new."""
        return self._lockstep and stats.step_counter >= self._proof_step and stats.current_wave > self.proved

    def prove(self, wave: int) -> list[FromRank]:
        """All ranks run in this wave, or have: the words of those that have not said so."""
        self.proved = wave
        runs = Observed(wave, True)
        words: list[FromRank] = []
        for rank in range(self.size):
            said = self._said.get(rank, NOTHING)
            if said.wave <= wave and said != runs:
                self._said[rank] = runs
                words.append(StartWave(rank, LIFE, wave))
        return words

    def start(self, rank: int, wave: int) -> FromRank:
        """A rank runs in this wave."""
        self._says(rank, wave, True)
        return StartWave(rank, LIFE, wave)

    def complete(self, wave: int) -> list[FromRank]:
        """All ranks have agreed to end this wave: the words of all but those that are beyond it."""
        words: list[FromRank] = []
        for rank in range(self.size):
            if self._said.get(rank, NOTHING).wave <= wave:
                self._said[rank] = Observed(wave + 1, False)
                words.append(WaveComplete(rank, LIFE, wave))
        return words

    def silent(self, wave: int) -> list[int]:
        """Ranks that have given no sign that they run in this wave, or of a later one."""
        runs = Observed(wave, True)
        said = ((rank, self._said.get(rank, NOTHING)) for rank in range(self.size))
        return [rank for rank, state in said if not (state == runs or state.wave > wave)]

    def loads(self) -> list[dict[str, object]]:
        """Every rank's last report, as `paceline loads` shows it; zeros where there is none."""
        none = RankReport(0, LIFE, 0, 0, False, Load())
        said = ((rank, self._reports.get(rank, none)) for rank in range(self.size))
        return [
            {"rank": rank, "waiting": last.load.waiting, "running": last.load.running, "kv_used": last.load.kv_used,
             "kv_total": last.load.kv_total, "wave": last.wave, "step": last.step & 0xFFFFFFFF}
            for rank, last in said
        ]  # fmt: skip

    def _says(self, rank: int, wave: int, running: bool) -> None:
        if wave >= self._said.get(rank, NOTHING).wave:
            self._said[rank] = Observed(wave, running)
