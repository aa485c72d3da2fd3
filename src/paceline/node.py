"""One node of a deployment: which processes it has, and what each is started with."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import time
from collections.abc import Callable
from functools import partial

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.messages import Scaling
from paceline.core.node import (
    CoordinatorSaid,
    Event,
    KeepRank,
    Node,
    RankEnded,
    ReviveRank,
    StartRank,
    StopRank,
    ToCoordinator,
)
from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.registry import find_engine
from paceline.errors import ConfigError, PacelineError, StartupError
from paceline.net import secret
from paceline.net.coordinator import DPCoordinator
from paceline.net.links import REFUSED_FOLDER, SocketFolder, new_identity
from paceline.net.node import Here, NodeLink, Rendezvous, facts_of, find_coordinator, own_host
from paceline.net.rank import RankSettings, run_rank
from paceline.net.sockets import tcp_address
from paceline.process.ray_link import RayLink, ShellSettings, ray_address
from paceline.process.spawn import start_child
from paceline.process.supervisor import Reporter, Supervisor
from paceline.server.process import FrontendSettings, Reserved, admin_host, reserve_port, run_frontend
from paceline.settings import DeploymentConfig, ParallelConfig

logger = logging.getLogger("paceline.supervisor")


def serve(config: DeploymentConfig, reporter: Reporter, on_ready: Callable[[Plan], None]) -> int:
    """Run this node until a signal; returns the exit status. Raises StartupError where it does not come up."""
    server = config.server
    supervisor = Supervisor(
        reporter,
        startup_timeout_s=server.startup_timeout_s,
        drain_timeout_s=server.drain_timeout_s,
        log_level=server.log_level,
        revive_s=server.revive_interval_s,
    )
    plans: list[Plan] = []

    def start(supervisor: Supervisor) -> None:
        ray = _connect_ray(config, supervisor) if config.parallel.on_ray else None
        plan = Plan(config if ray is None else ray.config, reporter.progress, ray)
        plans.append(plan)
        supervisor.at_end(plan.close)
        coordinator = _start_coordinator(plan, supervisor)
        for rank in config.parallel.local_ranks:
            _start_rank(plan, supervisor, rank)
        if not config.parallel.headless:
            for index in range(config.parallel.api_server_count):
                settings = partial(plan.frontend_settings, index)
                supervisor.add(f"front-end {index}", "front-end", run_frontend, settings, drains=True)
        _keep_ranks(plan, supervisor, coordinator)

    return supervisor.run(start, lambda: on_ready(plans[0]))


class OnRay(Struct, frozen=True):
    """The ranks run in a Ray cluster. `config`: with this node's address there."""

    config: DeploymentConfig
    link: RayLink


def _connect_ray(config: DeploymentConfig, supervisor: Supervisor) -> OnRay:
    """Connect to the cluster. Raises StartupError, and ConfigError for an address."""
    parallel, server = config.parallel, config.server
    local = parallel.data_parallel_size_local
    aimed_at = local if local and local < parallel.data_parallel_size else None
    link = RayLink(ShellSettings(ray_address(parallel.ray_address), aimed_at), server.log_level)
    supervisor.at_end(link.close)
    supervisor.watch(link.process, link.restart)
    host = link.wait_connected(server.startup_timeout_s)
    if parallel.data_parallel_master_ip == ParallelConfig().data_parallel_master_ip:
        parallel = replace(parallel, data_parallel_master_ip=host)
    return OnRay(replace(config, parallel=parallel), link)


def _start_rank(
    plan: Plan, supervisor: Supervisor, rank: int, provisional: Callable[[str], None] | None = None
) -> None:  # fmt: skip
    server = plan.config.server
    # The others' collectives wait for one that is stopped, and they cannot go on in a group without it.
    stopped_s = server.stall_timeout_s if plan.lockstep and plan.engine_class.joins_once else None
    start = start_child if plan.ray is None else partial(plan.ray.link.start, rank, plan.needs(), stopped_s)
    supervisor.add(
        rank_name(rank), "rank", run_rank, partial(plan.rank_settings, rank),
        max_restarts=server.max_rank_restarts, provisional=provisional, stopped_s=stopped_s, start=start,
    )  # fmt: skip


def _keep_ranks(plan: Plan, supervisor: Supervisor, coordinator: DPCoordinator | None) -> None:
    """Have ranks started and ended as the deployment is scaled."""

    def on_scaling(scaling: Scaling) -> None:
        if coordinator is not None:
            coordinator.resized(scaling.size)

    addresses = plan.addresses
    watchdog = NodeRanks(
        plan.node, supervisor, addresses.back_publish, addresses.back_output,
        partial(_start_rank, plan, supervisor), on_scaling,
    )  # fmt: skip
    supervisor.at_end(watchdog.close)


def _start_coordinator(plan: Plan, supervisor: Supervisor) -> DPCoordinator | None:
    """Start the coordinator where this node leads; ask the node that does for its addresses otherwise."""
    if not plan.config.parallel.leads:
        plan.join()
        return None
    config = plan.config
    coordinator = DPCoordinator(
        config.parallel, plan.lockstep, {"level": config.server.log_level}, rank_timeout_s=config.server.rank_timeout_s
    )
    supervisor.at_end(coordinator.shutdown)
    supervisor.watch(coordinator.proc, coordinator.restart)
    rendezvous = plan.lead(coordinator)
    if rendezvous is not None:
        supervisor.at_end(rendezvous.close)
    return coordinator


class Plan:
    """A node's addresses and settings. Raises StartupError where something is wrong from the start."""

    def __init__(
        self, config: DeploymentConfig, progress: Callable[[str, str, float], None], ray: OnRay | None = None
    ) -> None:
        self.config = config
        self.ray = ray
        _lock(config)
        self.folder = SocketFolder()
        self.shared_folder = self.folder.path / "front-ends"
        self.shared_folder.mkdir()
        (self.shared_folder / "metrics").mkdir()
        os.environ[REFUSED_FOLDER] = str(self.shared_folder / "metrics")
        self._reserved: list[Reserved] = []
        self.port = config.server.port
        try:
            self.engine_class = find_engine(config.engine.engine)
            if not config.parallel.headless:
                self._reserved.append(reserve_port(config.server.host, config.server.port))
                self.port = self._reserved[0].port
                if config.server.admin_port is not None:
                    self._reserved.append(reserve_port(admin_host(config.server), config.server.admin_port))
            if config.engine.task == "embed" and "embeddings" not in self.engine_class.supports:
                raise ConfigError(f"--task embed: is not supported by the {config.engine.engine} engine")
            asked = config.engine_settings()
            self.settings = self.engine_class.prepare(asked, lambda what, share: progress("model", what, share))
            self.lockstep = self.engine_class.steps_together(self.settings)
            """Whether the ranks run in waves."""
            _check_quota(config, self.lockstep)
        except EngineError as error:
            self.close()
            raise StartupError(str(error)) from None
        except PacelineError:
            self.close()
            raise
        self.addresses = Here()
        parallel = config.parallel
        self.node = Node(
            new_identity(), parallel.local_ranks, parallel.data_parallel_size,
            own_frontends=parallel.data_parallel_hybrid_lb, fixed=parallel.data_parallel_external_lb,
        )  # fmt: skip
        self._lives = itertools.count()
        self._places: dict[int, int] = {}

    def engine_settings(self, rank: int) -> EngineSettings:
        """What the engine of a rank is made from. It has the same place of this node in each of its lives."""
        place = self._places.setdefault(rank, len(self._places))
        places = max(len(self.config.parallel.local_ranks), place + 1)
        return replace(self.settings, rank=rank, place=place, places=places, host=self._host())

    def needs(self) -> dict[str, float]:
        """What of the cluster is set aside for a rank. Raises StartupError where that is nothing."""
        parallel, devices = self.config.parallel, self.engine_class.devices(self.settings)
        gpus = parallel.ray_gpus_per_rank
        needs = {"CPU": parallel.ray_cpus_per_rank, "GPU": devices if gpus is None else gpus}
        if not any(needs.values()):
            raise StartupError("--ray-cpus-per-rank: a rank needs some, or some of --ray-gpus-per-rank")
        return needs

    def lead(self, coordinator: DPCoordinator) -> Rendezvous | None:
        """Take the addresses of the coordinator started here; answer for them where other nodes will ask."""
        back_publish, back_output = coordinator.get_engine_socket_addresses()
        self.addresses = Here(coordinator.get_stats_publish_address(), back_output, back_publish)
        parallel = self.config.parallel
        if parallel.one_node or self.ray is not None:
            return None
        return Rendezvous(
            parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port, facts_of(self.config, self.settings),
            self.addresses,
        )  # fmt: skip

    def join(self) -> None:
        """Ask the leading node for the coordinator's addresses, for as long as it takes. Raises StartupError."""
        parallel = self.config.parallel
        self.addresses = find_coordinator(
            parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port, facts_of(self.config, self.settings),
        )  # fmt: skip

    def rank_settings(self, rank: int, _: int) -> RankSettings:
        """What the next life of a rank is started with. Each has addresses of its own, so that what is meant for
        another reaches nobody; those for collectives are empty where there are none.
        """
        life, parallel = next(self._lives), self.config.parallel
        if self.ray is not None:
            facts = facts_of(self.config, self.settings)
            return RankSettings(
                self.config, rank, "", self.addresses.back_publish, self.addresses.back_output, facts=facts
            )
        local = parallel.one_node or parallel.balanced_ranks is not None
        ports = (parallel.rank_port(rank, False), parallel.rank_port(rank, True))
        return RankSettings(
            self.config, rank, self._address(f"rank-{rank}.{life}", local, ports[0]),
            self.addresses.back_publish, self.addresses.back_output,
            self._address(f"group-{rank}.{life}", parallel.one_node, ports[1]) if self.lockstep else "",
            self.engine_settings(rank),
        )  # fmt: skip

    def _address(self, name: str, local: bool, port: int) -> str:
        """One on this node alone, or one that others reach too."""
        if local:
            return self.folder.address(name)
        return tcp_address(self._host(), port)

    def _host(self) -> str:
        """This node's address, for others where there are any."""
        parallel = self.config.parallel
        if parallel.one_node:
            return "127.0.0.1"
        return own_host(parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port)

    def frontend_settings(self, index: int, life: int) -> FrontendSettings:
        """What the life number `life` of front-end `index` of this node is started with."""
        balanced, node = self.config.parallel.balanced_ranks, self.node
        ranks = frozenset(range(node.scaling.size) if balanced is None else node.ranks)
        return FrontendSettings(
            self.config, index, self.port, self.addresses.front_publish, ranks, str(self.shared_folder), node.identity,
            self._enough(len(ranks)) if life == 0 else 1, self.settings,
        )  # fmt: skip

    def _enough(self, ranks: int) -> int:
        """How many of the ranks of a front-end must be ready before it serves for the first time."""
        return min(ranks, self.config.parallel.min_ready_ranks or (ranks if self.lockstep else 1))

    def close(self) -> None:
        for reserved in self._reserved:
            reserved.close()
        self.folder.close()


def _lock(config: DeploymentConfig) -> None:
    """Have what leaves the machine encrypted. Raises StartupError where it would not be, and nobody wants that."""
    parallel = config.parallel
    if parallel.secret_file is not None:
        secret.use(parallel.secret_file)
    elif parallel.off_the_machine:
        if not parallel.insecure:
            raise StartupError("--secret-file: several nodes need one (`paceline secret new`), or --insecure to do "
                               "without")  # fmt: skip
        logger.warning("--insecure: whoever reaches this node's ports reads prompts, answers, and may stop all")


def _check_quota(config: DeploymentConfig, lockstep: bool) -> None:
    wanted = config.parallel.prefill_quota
    if not lockstep and wanted not in ("auto", "off"):
        text = f"--prefill-quota {wanted}: only for engines in lockstep, which {config.engine.engine} is not"
        raise EngineError(text)


StartRankProcess = Callable[[int, Callable[[str], None]], None]
"""Starts a rank's process in the supervisor; the callable is told why it ended, until the rank is kept."""


class NodeRanks:
    """One node's ranks, from when it serves. `on_scaling`: called when the machine has heard of a change."""

    def __init__(
        self, machine: Node, supervisor: Supervisor, coordinator_input: str, coordinator_output: str,
        start_rank: StartRankProcess, on_scaling: Callable[[Scaling], None],
    ) -> None:  # fmt: skip
        self._machine = machine
        self._supervisor = supervisor
        self._start_rank = start_rank
        self._on_scaling = on_scaling
        self._link = NodeLink(machine.identity, coordinator_input, coordinator_output, supervisor.attend(self._attend))

    def close(self) -> None:
        self._link.close()

    def _attend(self) -> None:
        while True:
            try:
                message = self._link.inbox.get_nowait()
            except queue.Empty:
                return
            self._feed(CoordinatorSaid(message))

    def _feed(self, event: Event) -> None:
        before = self._machine.scaling.number
        effects = self._machine.handle(event, time.monotonic())
        if self._machine.scaling.number != before:
            self._on_scaling(self._machine.scaling)
        for effect in effects:
            match effect:
                case StartRank(rank):
                    logger.info("starting rank %d", rank)
                    self._start_rank(rank, lambda why, rank=rank: self._feed(RankEnded(rank, why)))  # type: ignore[misc]
                case KeepRank(rank):
                    self._supervisor.keep(rank_name(rank))
                case ReviveRank(rank):
                    self._supervisor.revive(rank_name(rank))
                case StopRank(rank):
                    logger.info("ending rank %d", rank)
                    self._supervisor.remove(rank_name(rank))
                case ToCoordinator(message):
                    self._link.send(message)


def rank_name(rank: int) -> str:
    return f"rank {rank}"
