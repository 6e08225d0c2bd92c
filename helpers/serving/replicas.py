"""Several copies of the model: Ray Serve runs the same app in a process each. What it leaves open: docs/scaling.md."""

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import EngineError, HelpersError
from ..model.loading import resolve_model
from ..network import listen
from ..paths import PROJECT_DIR
from .app import create_app
from .engine import QUEUE_SIZE, SLOTS
from .server import log_as_json

NAME = "characterglm"  # of the application on Ray
STICKY = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
INSTALL = "pip install -r requirements-cluster.txt -c constraints.txt"
# Read by Ray when it is imported: no telemetry, every line of the log as it is, and the priority of other programs.
SWITCHED_OFF = ("RAY_USAGE_STATS_ENABLED", "RAY_DEDUP_LOGS", "RAY_COLOR_PREFIX", "RAY_worker_niceness")
LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",)  # its name for "one machine only": it listens on 127.0.0.1


@dataclass
class Replicas:
    """How many copies, and where. Raises HelpersError for senseless numbers.

    Args:
        replicas, max_replicas: how many there are at least, and under load; as many by default.
        gpus_per_replica: 0 is the CPU, 0.5 puts two on one GPU; by default 1 if this machine has a GPU.
        ray_address: of a running Ray cluster that this machine belongs to; by default a Ray of its own.
        threads: of each replica, on a CPU; by default the cores are shared out.
    """

    replicas: int = 1
    max_replicas: int | None = None
    gpus_per_replica: float | None = None
    ray_address: str | None = None
    threads: int | None = None

    def __post_init__(self):
        most = self.max_replicas = self.max_replicas or self.replicas
        if self.gpus_per_replica is None:
            self.gpus_per_replica = float(torch.cuda.is_available())
        if not 1 <= self.replicas <= most:
            numbers = f"--replicas {self.replicas}，--max-replicas {most}"
            raise HelpersError(f"副本数不合理 [invalid replicas]：{numbers}；至少 1 个，最多不能少于最少")
        if (gpus := self.gpus_per_replica) < 0 or (gpus > 1 and gpus != int(gpus)):
            raise HelpersError(f"--gpus-per-replica {gpus:g} 不行 [invalid GPUs]：0 到 1 之间，或整数")
        self.threads = self.threads or max(1, (os.cpu_count() or 1) // most)


class Replica:
    """The app with a model of its own, in a process of Ray's."""

    async def __init__(self, model, threads: int, app_options: dict):
        torch.set_num_threads(threads)
        log_as_json()
        self.api = create_app(model, **app_options)
        await self.api.state.service.load()  # before Ray sends requests

    def __serve_build_asgi_app__(self):
        return self.api

    def check_health(self) -> None:
        """Ray replaces a replica of which this fails three times; an engine that died is started again by itself."""
        if self.api.state.service.status != "ready":
            raise EngineError("推理引擎没有在运行 [engine is down]")


def serve_replicas(model, host: str, port: int, grace_seconds: int, app_options: dict, chosen: Replicas) -> None:
    """Serve until SIGTERM or Ctrl-C; see `serve`."""
    listen(host, port).close()  # is it free?
    model = resolve_model(model).resolve()  # a replica may have another working directory
    app_options["adapters"] = {name: Path(path).resolve() for name, path in (app_options.get("adapters") or {}).items()}
    ray = start_ray(chosen)
    from ray import serve

    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has taken them
        signal.signal(number, signal.default_int_handler)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        serve.run(
            deployment(serve, chosen, grace_seconds, app_options).bind(model, chosen.threads, app_options), name=NAME
        )
        signal.pause()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise HelpersError(f"副本没有启动 [replicas did not start]：{reason}") from None
    except KeyboardInterrupt:
        pass
    finally:
        serve.delete(NAME)  # the replies being written are finished
        if not serve.status().applications:  # a cluster may have others
            serve.shutdown()
        ray.shutdown()


def deployment(serve, chosen: Replicas, grace_seconds: int, app_options: dict):
    """What Ray Serve has to know about the replicas."""
    slots = app_options.get("slots", SLOTS)
    room = (1 + len(app_options["adapters"])) * (slots + app_options.get("queue_size", QUEUE_SIZE))
    scaling = {"num_replicas": chosen.replicas}
    if chosen.max_replicas > chosen.replicas:
        limits = {"min_replicas": chosen.replicas, "max_replicas": chosen.max_replicas}
        scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": slots}}
    gpus = {"num_gpus": chosen.gpus_per_replica}
    return serve.deployment(
        name=NAME,
        ray_actor_options=gpus if chosen.gpus_per_replica else {"num_cpus": chosen.threads},
        max_ongoing_requests=room + 16,  # the app itself answers 429 before; a few more for /health and the like
        max_queued_requests=1000,  # a burst waits here until it is shared out; beyond that, Ray says 503
        # Requests with the same x-session-id go to the same replica, whose KV cache has the beginning of the chat.
        request_router_config={"request_router_class": STICKY},
        graceful_shutdown_timeout_s=grace_seconds,
        max_constructor_retry_count=1,
        **scaling,
    )(serve.ingress()(Replica))


def start_ray(chosen: Replicas):
    """The module `ray`, started or connected. Raises HelpersError: no Ray, no such cluster, too few GPUs."""
    # JupyterLab brings rfc3987_syntax, which `import ray` reaches through jsonschema and which takes 3 s to build its
    # grammar. All of Ray's processes would pay that, and Ray gives up if one of them is not up in time.
    shadow = PROJECT_DIR / "outputs" / "ray"
    shadow.mkdir(parents=True, exist_ok=True)
    (shadow / "rfc3987_syntax.py").write_text("raise ImportError")
    sys.modules.setdefault("rfc3987_syntax", None)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(shadow), str(PROJECT_DIR), os.getenv("PYTHONPATH")]))
    os.environ |= dict.fromkeys(SWITCHED_OFF + (LOOPBACK if chosen.ray_address is None else ()), "0")
    cpus = max(os.cpu_count() or 1, chosen.threads * chosen.max_replicas)
    own = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    joined = {"address": chosen.ray_address, "runtime_env": {"env_vars": {"PYTHONPATH": str(PROJECT_DIR)}}}
    try:
        import ray

        host, colon, number = (chosen.ray_address or "").rpartition(":")
        if colon:  # is anybody there? Ray itself would try for minutes
            socket.create_connection((host, int(number)), timeout=5).close()
        ray.init(**own if chosen.ray_address is None else joined)
    except ImportError:
        raise HelpersError(f"多个副本需要 Ray [ray required]。请运行 {INSTALL}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise HelpersError(f"连不上 Ray [no ray cluster]：{chosen.ray_address}：{error}") from None
    needed, there = chosen.gpus_per_replica * chosen.replicas, ray.cluster_resources().get("GPU", 0)
    if needed > there:  # Ray would wait for them for ever
        ray.shutdown()
        raise HelpersError(f"GPU 不够 [not enough GPUs]：{chosen.replicas} 个副本要 {needed:g} 个，只有 {there:g} 个")
    return ray
