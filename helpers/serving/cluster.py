"""More than one model: replicas on Ray Serve, on this machine or on a cluster, behind the same app.

The app runs here, in front: keys, limits, prompts, errors, log and metrics are those of the single server. Only token ids
travel: a prompt to a replica, the reply back.
"""

import asyncio
import importlib.metadata
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..errors import HelpersError
from ..model.loading import resolve_model
from ..paths import PROJECT_DIR
from .engine import QUEUE_SIZE, SLOTS
from .service import Service

logger = logging.getLogger(__name__)

RAY = "2.60"  # replica.py reaches into it
WATCH_SECONDS = 0.5
OBJECT_STORE_BYTES = 100 * 2**20  # holds token ids; Ray's own choice is 30 % of the memory
LOOPBACK = {
    # Ray's name for "one machine only": every process then listens on 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray lowers the priority of what it starts, here that of the model
}


@dataclass(frozen=True)
class ClusterOptions:
    """How many replicas, and where.

    Args:
        replicas: how many there are at least.
        max_replicas: how many there may be under load; None: as many as `replicas`.
        gpus_per_replica: 0 is the CPU, 0.5 puts two on one GPU; None: 1 if this machine has a GPU, else 0.
        ray_address: of a running Ray cluster that this machine belongs to; None: a Ray of one's own on this machine.
    """

    replicas: int = 1
    max_replicas: int | None = None
    gpus_per_replica: float | None = None
    ray_address: str | None = None

    @property
    def most(self) -> int:
        """The largest number of replicas."""
        return self.max_replicas or self.replicas

    @property
    def gpus(self) -> float:
        """GPUs of one replica."""
        return float(torch.cuda.is_available()) if self.gpus_per_replica is None else self.gpus_per_replica

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            HelpersError: senseless numbers, or Ray is missing or another one than tested.
        """
        if self.replicas < 1 or self.most < self.replicas:
            raise HelpersError(
                f"副本数不合理 [invalid replicas]：--replicas {self.replicas}，--max-replicas {self.most}；"
                "至少 1 个，最多不能少于最少"
            )
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise HelpersError(f"--gpus-per-replica {self.gpus:g} 不行 [invalid GPUs]：0 到 1 之间，或整数")
        try:
            version = importlib.metadata.version("ray")
        except importlib.metadata.PackageNotFoundError:
            version = "没有安装"
        if not version.startswith(f"{RAY}."):
            raise HelpersError(
                f"多个副本需要 Ray {RAY} [ray {RAY} required]，现在是：{version}。"
                "请运行 pip install -r requirements-cluster.txt -c constraints.txt"
            )


class Cluster:
    """Replicas of one model on Ray Serve.

    Args:
        options: how many, and where.
        name: of the application on Ray; an application that has it already is replaced.
    """

    def __init__(self, options: ClusterOptions, name: str = "characterglm"):
        self.options, self.name = options, name
        self.running = self.lost = self.threads = 0
        self.handle = self._watcher = None

    def connect(self, threads: int | None = None) -> None:
        """Start Ray, or connect to it. Call in the main thread, before the server: Ray takes the signals for itself.

        Args:
            threads: of each replica, on a CPU; by default the cores are shared out among the replicas.

        Raises:
            HelpersError: there is no such cluster, or it has too few GPUs or CPUs.
        """
        cores = os.cpu_count() or 1
        self.threads = threads or max(1, cores // self.options.most)
        cpus = max(cores, self.threads * self.options.most)
        alone = self.options.ray_address is None
        if alone:
            self._require({"GPU": torch.cuda.device_count(), "CPU": cpus})
        else:
            _knock(self.options.ray_address)
        _prepare_environment(alone)
        import ray

        quiet = {"configure_logging": False, "log_to_driver": False, "namespace": "characterglm"}
        if alone:
            ray.init("local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **quiet)
        else:
            self._join(quiet)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _join(self, quiet: dict) -> None:
        import ray

        address = self.options.ray_address
        try:
            ray.init(address, runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT_DIR)}}, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise _no_cluster(address, error) from None
        self._require(ray.cluster_resources())

    @property
    def _resources(self) -> dict[str, float]:
        """What Ray sets aside for one replica."""
        return {"num_gpus": self.options.gpus} if self.options.gpus else {"num_cpus": self.threads}

    def _require(self, there: dict[str, float]) -> None:
        """Refuse what is not there: Ray would wait for it for ever."""
        for option, name in (("num_gpus", "GPU"), ("num_cpus", "CPU")):
            needed = self._resources.get(option, 0) * self.options.replicas
            if needed > there.get(name, 0):
                raise HelpersError(
                    f"{name} 不够 [not enough {name}s]：{self.options.replicas} 个副本要 {needed:g} 个，"
                    f"只有 {there.get(name, 0):g} 个。减少 --replicas 或 --gpus-per-replica"
                )

    def deploy(self, directory: Path, adapters: dict[str, str], **engine_options) -> None:
        """Begin to start the replicas; the directories have to be there on each machine."""
        from ray import serve
        from ray.serve.config import ProxyLocation, RequestRouterConfig
        from ray.serve.schema import LoggingConfig

        from .replica import Replica, StickyRouter

        engines = 1 + len(adapters)
        # A little more than its slots: the next request is there when a slot is free, without a word to the front.
        at_once = (engine_options["slots"] + -(-engine_options["slots"] // 4)) * engines
        waiting = at_once * self.options.most + engine_options["queue_size"] * engines
        # The rest waits in front, where a request can still go to the replica that is free first.
        arguments = str(directory), adapters, self.threads, {**engine_options, "queue_size": at_once}
        scaling = {"num_replicas": self.options.replicas}
        if self.options.most > self.options.replicas:
            limits = {"min_replicas": self.options.replicas, "max_replicas": self.options.most}
            scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": engine_options["slots"]}}
        deployment = serve.deployment(
            name="replica",
            ray_actor_options=self._resources,
            max_ongoing_requests=at_once,
            max_queued_requests=waiting,
            request_router_config=RequestRouterConfig(
                request_router_class=StickyRouter, initial_backoff_s=0.01, backoff_multiplier=2, max_backoff_s=0.05
            ),
            health_check_period_s=1,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=120,  # when there are to be fewer: the replies being written are finished
            max_constructor_retry_count=1,
            logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
            **scaling,
        )(Replica)
        serve.start(proxy_location=ProxyLocation.Disabled)  # the front is ours
        target = serve.RunTarget(deployment.bind(*arguments), name=self.name, route_prefix=None)
        (self.handle,) = serve.run_many([target], wait_for_applications_running=False)

    def service(self, *arguments, **options) -> "ClusterService":
        """A `Service` with its model here."""
        return ClusterService(*arguments, cluster=self, **options)

    async def ready(self) -> None:
        """Wait until the replicas run, and keep watch from now on.

        Raises:
            HelpersError: they cannot start.
        """
        while True:
            status = await asyncio.to_thread(self._status)
            if status.status == "RUNNING":
                break
            if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise HelpersError(f"副本没有启动 [replicas did not start]：{_reason(status)}")
            await asyncio.sleep(WATCH_SECONDS)
        self.running = self._running(status)
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Count the replicas that run."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                running = self._running(await asyncio.to_thread(self._status))
            except Exception:
                logger.exception("cannot ask ray")
                continue
            if running < min(self.running, self.options.replicas):  # below what autoscaling may do
                self.lost += min(self.running, self.options.replicas) - running
                logger.error("replicas lost", extra={"running": running})
            self.running = running

    def _status(self):
        from ray import serve

        return serve.status().applications[self.name]

    def _running(self, status) -> int:
        return sum(deployment.replica_states.get("RUNNING", 0) for deployment in status.deployments.values())

    async def close(self) -> None:
        """End the replicas, and Ray if it is our own."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        self.running = 0
        await asyncio.to_thread(self._shut_down)

    def _shut_down(self) -> None:
        import ray
        from ray import serve

        if self.options.ray_address is not None and self.handle is not None:
            serve.delete(self.name)
            if not serve.status().applications:
                serve.shutdown()
        ray.shutdown()


def _reason(status) -> str:
    """The end of the traceback that Ray tells: our own message, if it was an error of ours."""
    messages = [deployment.message for deployment in status.deployments.values()] or [status.message]
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else status.status


def _knock(address: str) -> None:
    """Whether anybody is there: Ray itself would try for minutes."""
    if ":" in address:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError) as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> HelpersError:
    return HelpersError(f"连不上 Ray [no ray cluster]：{address}：{error}。先在这台机器上 ray start")


def _prepare_environment(alone: bool) -> None:
    """What has to be set before Ray is imported; its processes inherit it."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if alone:
        os.environ.update(LOOPBACK)
    sys.modules.setdefault("rfc3987_syntax", None)  # see ray_path
    paths = [str(Path(__file__).parent / "ray_path"), str(PROJECT_DIR), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


class ClusterService(Service):
    """As `Service`, with the model in the replicas of a cluster.

    Args:
        cluster: one that is connected.
        model, adapters, engine_options: as for `Service`.
    """

    def __init__(self, model="auto", adapters=None, *, cluster: Cluster, **engine_options):
        super().__init__(model, adapters, **{"slots": SLOTS, "queue_size": QUEUE_SIZE, **engine_options})
        self.cluster = cluster

    @property
    def replicas(self) -> int:
        """How many run."""
        return self.cluster.running

    async def _load(self) -> dict:
        from .remote import RemoteEngine

        directory = resolve_model(self.source)
        adapters = {name: str(Path(path).resolve()) for name, path in self.adapters.items()}
        await asyncio.to_thread(self.cluster.deploy, directory.resolve(), adapters, **self.engine_options)
        self.tokenizer = await asyncio.to_thread(AutoTokenizer.from_pretrained, directory)
        await self.cluster.ready()
        described = await self.cluster.handle.describe.remote()
        self.defaults = described["defaults"]
        options = {name: self.engine_options[name] for name in ("slots", "queue_size")}
        return {
            name: RemoteEngine(name, self.cluster, **options, context=described["context"])
            for name in (self.name, *self.adapters)
        }

    async def close(self) -> None:
        """End the replies, then the replicas."""
        await super().close()
        await self.cluster.close()
