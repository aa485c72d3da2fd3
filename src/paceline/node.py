"""One node of a deployment: which processes it has, and what each is started with."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from functools import partial

from paceline.core.messages import Scaling
from paceline.core.node import Node
from paceline.core.rank.prefill_quota import setting_of
from paceline.engines.base import Engine, EngineError, EngineSettings
from paceline.engines.registry import find_engine
from paceline.errors import StartupError
from paceline.net.coordinator import DPCoordinator
from paceline.net.links import SocketFolder, new_identity
from paceline.net.node import Here, Rendezvous, find_coordinator, own_host
from paceline.net.rank import RankSettings, run_rank
from paceline.net.sockets import tcp_address
from paceline.process.node import NodeRanks, rank_name
from paceline.process.supervisor import Reporter, Supervisor
from paceline.server.process import FrontendSettings, reserve_port, run_frontend
from paceline.settings import DeploymentConfig


def serve(config: DeploymentConfig, reporter: Reporter, on_ready: Callable[[Plan], None]) -> int:
    """Run this node until a signal; returns the exit status. Raises StartupError where it does not come up."""
    server = config.server
    supervisor = Supervisor(
        reporter,
        startup_timeout_s=server.startup_timeout_s,
        drain_timeout_s=server.drain_timeout_s,
        log_level=server.log_level,
    )
    plans: list[Plan] = []

    def start(supervisor: Supervisor) -> None:
        plan = Plan(config, reporter.progress)
        plans.append(plan)
        supervisor.at_end(plan.close)
        coordinator = _start_coordinator(plan, supervisor)
        for rank in config.parallel.local_ranks:
            _start_rank(plan, supervisor, rank)
        if not config.parallel.headless:
            for index in range(config.parallel.api_server_count):
                settings = partial(frontend_settings, plan, index)
                supervisor.add(f"front-end {index}", "front-end", run_frontend, settings, drains=True)
        _keep_ranks(plan, supervisor, coordinator)

    return supervisor.run(start, lambda: on_ready(plans[0]))


def _start_rank(
    plan: Plan, supervisor: Supervisor, rank: int, provisional: Callable[[str], None] | None = None
) -> None:  # fmt: skip
    supervisor.add(
        rank_name(rank), "rank", run_rank, lambda life: rank_settings(plan, rank),
        max_restarts=plan.config.server.max_rank_restarts, provisional=provisional,
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
    if not plan.leads:
        plan.join()
        return None
    config = plan.config
    # Its notes of who is ready would run into the start-up display, which says the same.
    level = "warning" if config.server.log_level == "info" else config.server.log_level
    coordinator = DPCoordinator(
        config.parallel, plan.lockstep, {"level": level}, rank_timeout_s=config.server.rank_timeout_s
    )
    supervisor.at_end(coordinator.shutdown)
    supervisor.watch(coordinator.proc, coordinator.restart)
    rendezvous = plan.lead(coordinator)
    if rendezvous is not None:
        supervisor.at_end(rendezvous.close)
    return coordinator


class Plan:
    """A node's addresses and settings. Raises StartupError where something is wrong from the start."""

    def __init__(self, config: DeploymentConfig, progress: Callable[[str, str, float], None]) -> None:
        self.config = config
        self.folder = SocketFolder()
        self._reserved: socket.socket | None = None
        self.port = config.server.port
        try:
            self.engine_class = find_engine(config.engine.engine)
            self.settings = _engine_settings(config, 0)
            _check_quota(config, self.engine_class)
            if not config.parallel.headless:
                self._reserved = reserve_port(config.server.host, config.server.port)
                self.port = self._reserved.getsockname()[1]
            self.engine_class.check(self.settings, lambda what, share: progress("model", what, share))
        except EngineError as error:
            self.close()
            raise StartupError(str(error)) from None
        except StartupError:
            self.close()
            raise
        self.addresses = Here()
        parallel = config.parallel
        self.node = Node(
            new_identity(), parallel.local_ranks, parallel.data_parallel_size,
            own_frontends=parallel.data_parallel_hybrid_lb, fixed=parallel.data_parallel_external_lb,
        )  # fmt: skip
        self._lives = itertools.count()

    @property
    def leads(self) -> bool:
        """Whether this node runs the coordinator."""
        return self.config.parallel.leads

    @property
    def lockstep(self) -> bool:
        """Whether the ranks run in waves."""
        return self.engine_class.lockstep

    def lead(self, coordinator: DPCoordinator) -> Rendezvous | None:
        """Take the addresses of the coordinator started here; answer for them where other nodes will ask."""
        back_publish, back_output = coordinator.get_engine_socket_addresses()
        self.addresses = Here(coordinator.get_stats_publish_address(), back_output, back_publish)
        parallel = self.config.parallel
        if parallel.one_node:
            return None
        return Rendezvous(
            parallel.data_parallel_master_ip,
            parallel.data_parallel_rpc_port,
            parallel.data_parallel_size,
            self.config.engine.engine,
            self.addresses,
        )

    def join(self) -> None:
        """Ask the leading node for the coordinator's addresses. Raises StartupError."""
        parallel = self.config.parallel
        self.addresses = find_coordinator(
            parallel.data_parallel_master_ip,
            parallel.data_parallel_rpc_port,
            parallel.data_parallel_size,
            self.config.engine.engine,
            self.config.server.startup_timeout_s,
        )

    def life(self) -> int:
        """A number for a rank's next life: each has addresses of its own, so that what is meant for another reaches
        nobody.
        """
        return next(self._lives)

    def rank_address(self, rank: int, life: int) -> str:
        """Where a rank's front-ends reach it: on this node alone, or from others too."""
        parallel = self.config.parallel
        if parallel.one_node or parallel.balanced_ranks is not None:
            return self.folder.address(f"rank-{rank}.{life}")
        return tcp_address(own_host(parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port))

    def group_address(self, rank: int, life: int) -> str:
        """Where a rank's peers reach it for collectives; empty where there are none."""
        parallel = self.config.parallel
        if not self.lockstep:
            return ""
        if parallel.one_node:
            return self.folder.address(f"group-{rank}.{life}")
        return tcp_address(own_host(parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port))

    def close(self) -> None:
        """Give back the port and the sockets' folder."""
        if self._reserved is not None:
            self._reserved.close()
        self.folder.close()


def rank_settings(plan: Plan, rank: int) -> RankSettings:
    """What the next life of a rank is started with."""
    life = plan.life()
    return RankSettings(
        engine=plan.config.engine.engine,
        settings=_engine_settings(plan.config, rank),
        bind=plan.rank_address(rank, life),
        coordinator_input=plan.addresses.back_publish,
        coordinator_output=plan.addresses.back_output,
        report_loads=not plan.config.parallel.data_parallel_external_lb,
        group_bind=plan.group_address(rank, life),
        sync_interval=plan.config.parallel.dp_sync_interval,
        stall_timeout_s=plan.config.server.stall_timeout_s,
        prefill_quota=setting_of(plan.config.parallel.prefill_quota),
    )


def frontend_settings(plan: Plan, index: int, life: int) -> FrontendSettings:
    """What the life number `life` of front-end `index` of this node is started with."""
    config = plan.config
    parallel, server = config.parallel, config.server
    ranks = frozenset(range(plan.node.scaling.size) if parallel.balanced_ranks is None else plan.node.ranks)
    return FrontendSettings(
        index=index,
        count=parallel.api_server_count,
        host=server.host,
        port=plan.port,
        coordinator=plan.addresses.front_publish,
        engine=config.engine.engine,
        settings=plan.settings,
        ranks=None if parallel.balanced_ranks is None else ranks,
        awaited=ranks,
        node=plan.node.identity,
        most_ranks=parallel.most_ranks,
        routing=server.routing,
        late_binding=config.late_binding,
        served_model_name=config.engine.served_model_name,
        max_waiting=server.max_waiting or None,
        max_body_bytes=server.max_body_bytes,
        drain_timeout_s=server.drain_timeout_s,
        first_life=life == 0,
        rank_timeout_s=server.rank_timeout_s,
        most_losses=server.max_rank_losses,
    )


def _check_quota(config: DeploymentConfig, engine: type[Engine]) -> None:
    wanted = config.parallel.prefill_quota
    if not engine.lockstep and wanted not in ("auto", "off"):
        text = f"--prefill-quota {wanted}: only for engines in lockstep, which {config.engine.engine} is not"
        raise EngineError(text)


def _engine_settings(config: DeploymentConfig, rank: int) -> EngineSettings:
    engine = config.engine
    return EngineSettings(
        model=engine.model,
        rank=rank,
        dp_size=config.parallel.data_parallel_size,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_cache_tokens=engine.kv_cache_tokens,
        threads=config.threads_per_rank,
        seed=engine.seed,
        options=dict(engine.options),
    )
